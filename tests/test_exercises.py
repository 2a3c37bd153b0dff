"""The code exercises of every chapter: the stub is told `not yet`, the folded solution `passed`, a broken answer `not yet`.

A chapter marks its cells by tags. `setup`: what the checks need. `exercise`: one function whose body is `...`.
`exercise-check`, the next code cell: calls it and prints one line. The solution is the one ```python block, in a text
cell after the stub, that defines the function.
"""

import ast
import contextlib
import io
import json
import re
from dataclasses import dataclass

import pytest
from conftest import ROOT

import segedu as sg

CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Exercise:
    chapter: str
    name: str
    stub: str
    check: str
    solutions: list[str]
    stored: str  # what the check printed when the chapter was frozen


def read(path):
    """(tags, kind, source, printed) of every cell."""
    for cell in json.loads(path.read_text())["cells"]:
        printed = "".join("".join(output.get("text", "")) for output in cell.get("outputs", []))
        yield set(cell["metadata"].get("tags", [])), cell["cell_type"], "".join(cell["source"]), printed


def exercises(path):
    cells = list(read(path))
    for at, (tags, _, source, _) in enumerate(cells):
        if "exercise" not in tags:
            continue
        functions = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        name = functions[0] if len(functions) == 1 else f"{len(functions)} functions in cell {at}"
        after = cells[at + 1 :]
        check = next((cell for cell in after if cell[1] == "code"), (set(), "", "", ""))
        blocks = [block for _, kind, text, _ in after if kind == "markdown" for block in BLOCK.findall(text)]
        solutions = [block for block in blocks if re.search(rf"^def {re.escape(name)}\(", block, re.M)]
        yield Exercise(path.stem, name, source, check[2] if "exercise-check" in check[0] else "", solutions, check[3])


ALL = [exercise for path in CHAPTERS for exercise in exercises(path)]
each = pytest.mark.parametrize("exercise", ALL, ids=lambda exercise: f"{exercise.chapter}-{exercise.name}")


@pytest.fixture(scope="module")
def prepared():
    """The names that the `setup` cells of a chapter define, by chapter; they run in its folder, as in the notebook."""
    made = {}

    def names(chapter):
        if chapter not in made:
            made[chapter] = {"sg": sg, "__name__": "__main__"}
            path = ROOT / "chapters" / f"{chapter}.ipynb"
            with contextlib.chdir(path.parent), contextlib.redirect_stdout(io.StringIO()):
                for tags, _, source, _ in read(path):
                    if "setup" in tags:
                        exec(source, made[chapter])
        return dict(made[chapter])

    return names


def verdict(exercise, answer, names):
    """What the check prints for an answer, given as source."""
    exec(answer, names)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.chdir(ROOT / "chapters"):
        exec(exercise.check, names)
    lines = out.getvalue().splitlines()
    assert len(lines) == 1, f"the check must print one line, got {lines}"
    return lines[0]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_has_code_exercises(path):
    found = [exercise.name for exercise in ALL if exercise.chapter == path.stem]
    assert len(found) >= 2
    assert len(set(found)) == len(found), "two exercises define the same function"


@each
def test_exercise_is_complete(exercise):
    """One function with an empty body, a check right after it, and one folded solution."""
    (function,) = ast.parse(exercise.stub).body
    *first, last = function.body
    assert ast.unparse(last) == "...", "the body of a stub is ..."
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in first)  # a docstring
    assert exercise.check, "the next code cell must have the tag exercise-check"
    assert len(exercise.solutions) == 1, f"{len(exercise.solutions)} solutions define {exercise.name}"
    assert exercise.stored.startswith("not yet:"), "the stored page must show the answer to the empty stub"


@each
def test_stub_does_not_pass(exercise, prepared):
    assert verdict(exercise, exercise.stub, prepared(exercise.chapter)).startswith("not yet:")


@each
def test_solution_passes(exercise, prepared):
    assert verdict(exercise, exercise.solutions[0], prepared(exercise.chapter)).startswith("passed")


@each
@pytest.mark.parametrize("body", ["raise ValueError('first line\\nsecond line')", "return 'wrong'", "return object()"])
def test_broken_answer_is_told(exercise, body, prepared):
    """A check raises for no answer, and takes none of these for right."""
    answer = f"def {exercise.name}(*arguments, **options):\n    {body}"
    assert verdict(exercise, answer, prepared(exercise.chapter)).startswith("not yet:")
