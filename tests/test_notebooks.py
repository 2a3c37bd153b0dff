"""The stored chapters: clean, run, small, and with outputs that nbval compares (the run itself is in `make test`)."""

import json

import freeze
import pytest
from conftest import ROOT

CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
MIN_COMPARED = 5  # cells per chapter with the tag nbval-check-output


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_is_clean(path):
    assert freeze.problems(path) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_has_compared_cells(path):
    compared = [cell for cell in cells(path, "code") if "nbval-check-output" in cell["metadata"].get("tags", [])]
    assert len(compared) >= MIN_COMPARED
    assert all(cell["outputs"] for cell in compared), "a compared cell without output compares nothing"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_cell_is_skipped(path):
    """nbval runs every cell; only cells that are tagged to raise may fail."""
    tags = {tag for cell in cells(path, "code") for tag in cell["metadata"].get("tags", [])}
    assert not tags & {"nbval-skip", "skip-execution"}


def broken(change):
    """The problems of a two-cell notebook after `change` to its second cell."""
    code = {"cell_type": "code", "metadata": {}, "outputs": []}
    text = {"output_type": "execute_result", "data": {"text/plain": ["3"]}, "metadata": {}, "execution_count": 2}
    setup = freeze.setup_cell(freeze.address())
    first = {**code, "id": "cell-000", "source": setup.splitlines(keepends=True), "execution_count": 1}
    second = {**code, "id": "cell-001", "source": ["1 + 2"], "execution_count": 2, "outputs": [text]}
    change(second)
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": [first, second], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


PICTURE = {"output_type": "display_data", "data": {"image/png": "AAAA"}, "metadata": {}}
ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
STDERR = {"output_type": "stream", "name": "stderr", "text": ["50%"]}
HOME = {"output_type": "stream", "name": "stdout", "text": ["/home/me/book"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cell: cell.update(execution_count=None), "never run"),
        (lambda cell: cell.update(execution_count=7), "not clean"),
        (lambda cell: cell.update(id="a1b2c3"), "not clean"),
        (lambda cell: cell["metadata"].update(collapsed=True), "not clean"),
        (lambda cell: cell.update(outputs=[STDERR]), "not clean"),
        (lambda cell: cell.update(outputs=[ERROR]), "stored error, ValueError"),
        (lambda cell: cell.update(outputs=[PICTURE]), "without alt text"),
        (lambda cell: cell.update(outputs=[HOME]), "path of one machine"),
        (lambda cell: cell.update(source=["x = 1\n"] * 15 + ["x"]), "16 lines"),
        (lambda cell: cell["outputs"][0]["data"].update({"text/html": "x" * 400_001}), "400001 bytes"),
        (lambda cell: cell.update(cell_type="markdown", source=["{ref}`a`"]), "MyST"),
        (lambda cell: cell.update(cell_type="markdown", source=["```{note}\n", "a\n", "```"]), "MyST"),
    ],
)
def test_check_finds(change, message, tmp_path):
    notebook = broken(change)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell.pop("outputs"), cell.pop("execution_count")
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps(notebook))
    assert any(message in problem for problem in freeze.problems(path))


def test_check_passes_a_clean_notebook(tmp_path):
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps(broken(lambda cell: None)))
    assert freeze.problems(path) == []


def test_prints_are_stored_as_one():
    out = {"output_type": "stream", "name": "stdout"}
    result = {"output_type": "execute_result", "data": {"text/plain": "3"}}
    pieces = [out | {"text": ["a\n"]}, out | {"text": "b\n"}, result, out | {"text": "c\n"}]
    assert freeze.merged(pieces) == [out | {"text": "a\nb\n"}, result, out | {"text": "c\n"}]


@pytest.mark.slow
def test_freeze_is_reproducible(tmp_path):
    notebook = broken(
        lambda cell: cell.update(source=["import sys, time\n", "print(time.time() > 0)\n", "_ = sys.stderr.write('x')"])
    )
    notebook["cells"][0]["source"] = ["1"]
    path = tmp_path / "n.ipynb"
    stored = []
    for _ in range(2):
        path.write_text(json.dumps(notebook))
        freeze.freeze(path)
        stored.append(path.read_bytes())
    assert stored[0] == stored[1]
    outputs = [output for cell in json.loads(stored[0])["cells"] for output in cell["outputs"]]
    assert [(output.get("name"), output.get("text")) for output in outputs if output["output_type"] == "stream"] == [
        ("stdout", ["True\n"])
    ]
