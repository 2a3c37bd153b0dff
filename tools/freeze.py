"""Runs notebooks in a fresh kernel and stores their outputs clean and byte for byte reproducible.

    python tools/freeze.py [--check] [NOTEBOOK ...]      default: all chapters

--check runs nothing: it says what is wrong with the stored notebooks and exits with 1 if there is anything.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from queue import Empty

from address import address, setup_cell

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
    "SOURCE_DATE_EPOCH": "0",
    "SEGEDU_SCALE": "mini",
}
MAX_NOTEBOOK, MAX_OUTPUT, MAX_LINES = 1_500_000, 400_000, 15  # bytes, bytes, lines of a code cell
LIVE = "application/vnd.jupyter.widget-view+json"
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
MYST = re.compile(r"^(```|:::)\s*\{|(?<![\w`])\{[a-z:-]+\}`", re.M)
OWN_PATH = re.compile(r"(?<![\w:/.])/(?:home|root|Users|tmp|work|opt|usr|var|mnt)/[\w.-]+")


def awake(channel) -> None:
    """Looks into a kernel's channel every second: asyncio's wake-up for a message can be lost, and nbclient then waits
    for its whole timeout (seen with pyzmq 27)."""
    ask = channel.get_msg

    async def get_msg(timeout=None):
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return await ask(timeout=1)
            except Empty:
                if end is not None and time.monotonic() >= end:
                    raise

    channel.get_msg = get_msg


def run(notebook, folder: Path, kernel: str = "python3", **environment: str) -> None:
    """Runs all cells in a fresh kernel that starts in `folder`; outputs go into the notebook."""
    from nbclient import NotebookClient

    client = NotebookClient(notebook, timeout=600, kernel_name=kernel, record_timing=False, raise_on_iopub_timeout=True)
    with client.setup_kernel(cwd=str(folder), env={**os.environ, **ENVIRONMENT, **environment}):
        awake(client.kc.shell_channel)
        awake(client.kc.iopub_channel)
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)


def clean_output(output: dict) -> dict | None:
    """An output without what changes from run to run; None if nothing is left to show without a kernel."""
    if output["output_type"] == "stream":
        return None if output["name"] == "stderr" else dict(output)
    output = {key: value for key, value in output.items() if key not in ("execution_count", "metadata", "transient")}
    live = LIVE in output.get("data", {})
    data = {mime: value for mime, value in output.get("data", {}).items() if mime != LIVE}
    if live and "text/html" not in data:
        return None
    output["data"] = dict(sorted(data.items()))
    output["metadata"] = {}
    return output


def merged(outputs: list[dict]) -> list[dict]:
    """Neighbouring prints as one: how they arrive, in one piece or in several, is chance."""
    whole = []
    for output in outputs:
        last = whole[-1] if whole else {}
        if output["output_type"] == last.get("output_type") == "stream" and output["name"] == last["name"]:
            last["text"] = text_of(last["text"]) + text_of(output["text"])
        else:
            whole.append(output)
    return whole


def clean(notebook) -> None:
    """In place: outputs, metadata, counts and cell ids as they are stored."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    count = 0
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:03d}"
        cell["metadata"] = {key: cell["metadata"][key] for key in ("mystnb", "tags") if key in cell["metadata"]}
        if cell["cell_type"] != "code":
            continue
        if cell["source"].strip():
            count += 1
        cell["execution_count"] = count if cell["source"].strip() else None
        cell["outputs"] = merged([kept for kept in map(clean_output, cell["outputs"]) if kept is not None])
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = count


def dumps(notebook) -> str:
    import nbformat

    text = nbformat.writes(nbformat.from_dict(notebook), version=4)
    return json.dumps(json.loads(text), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def freeze(path: Path) -> None:
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    start = time.perf_counter()
    run(notebook, path.parent)
    clean(notebook)
    path.write_text(dumps(notebook))
    print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} KB")


def text_of(value) -> str:
    return value if isinstance(value, str) else "".join(value) if isinstance(value, list) else json.dumps(value)


def problems(path: Path) -> list[str]:
    """What is wrong with a stored notebook; empty if nothing is."""
    import nbformat

    found = []
    notebook = nbformat.read(path, as_version=4)
    stored = path.read_text()
    cleaned = nbformat.from_dict(json.loads(json.dumps(notebook)))
    clean(cleaned)
    if len(stored.encode()) > MAX_NOTEBOOK:
        found.append(f"is {len(stored.encode())} bytes, at most {MAX_NOTEBOOK}: fewer or smaller figures")
    if notebook.metadata != cleaned.metadata:
        found.append("has notebook metadata beyond kernelspec and language: run `make freeze`")
    code = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    if not code or code[0]["source"] != setup_cell(address()):
        found.append("first code cell is not setup_cell() of tools/address.py: run `make address` with your address")
    for index, (cell, wanted) in enumerate(zip(notebook.cells, cleaned.cells, strict=True)):
        where = f"cell {index}"
        if cell["cell_type"] == "markdown":
            if MYST.search(cell["source"]):
                found.append(f"{where}: MyST syntax, which Colab does not show: use plain Markdown")
            if re.search(r"!\[\s*\]\(", cell["source"]):
                found.append(f"{where}: a picture without alt text")
            continue
        if cell["cell_type"] != "code":
            continue
        lines = cell["source"].count("\n") + 1
        if lines > MAX_LINES:
            found.append(f"{where}: {lines} lines, at most {MAX_LINES}: split it")
        if cell["source"].strip() and cell["execution_count"] is None:
            found.append(f"{where}: never run: run `make freeze`")
        elif cell != wanted:
            found.append(f"{where}: ids, counts, metadata or outputs are not clean: run `make freeze`")
        if OWN_PATH.search(cell["source"]):
            found.append(f"{where}: a path of one machine in the source")
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"{where}: a stored error, {output['ename']}: {output['evalue']}")
                continue
            data = {"text/plain": output["text"]} if output["output_type"] == "stream" else output["data"]
            for mime, value in data.items():
                text = text_of(value)
                if len(text) > MAX_OUTPUT:
                    found.append(f"{where}: an output of {len(text)} bytes, at most {MAX_OUTPUT}")
                if mime.startswith("text/") and OWN_PATH.search(text):
                    found.append(f"{where}: a path of one machine in the output: {OWN_PATH.search(text)[0]}")
            if any(mime in data for mime in PICTURES) and len(alt) < 10:
                found.append(f"{where}: a figure without alt text: cell metadata mystnb: {{image: {{alt: ...}}}}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="run nothing, only look")
    parser.add_argument("notebooks", nargs="*", type=Path)
    arguments = parser.parse_args()
    paths = arguments.notebooks or sorted((ROOT / "chapters").glob("*.ipynb"))
    if not arguments.check:
        for path in paths:
            freeze(path.resolve())
    found = [f"{path}: {problem}" for path in paths for problem in problems(path)]
    print(*found, sep="\n") if found else print(f"{len(paths)} notebooks, nothing wrong")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
