"""The shape of the package: who imports whom, what a model's file says, what an import costs."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "segedu"
MODELS = sorted(path for path in (PACKAGE / "models").glob("*.py") if path.name != "__init__.py")
MODELS += [PACKAGE / "crf" / "dense.py", PACKAGE / "crf" / "rnn.py"]
# (model, model it builds on) where the paper itself says "we build on"
SIDEWAYS = {("deeplab_v2", "deeplab_v1"), ("deeplab_v3plus", "deeplab_v3"), ("autodeeplab", "deeplab_v3")}

# What a file may import from segedu itself. Everything else may import what it needs.
ALLOWED = {
    "layers": set(),
    "metrics": set(),
    "receptive": set(),
    "features": {"receptive"},
    "recipes": set(),
    "backbones": {"layers"},
    "models": {"layers", "backbones"},
    "crf": {"crf", "layers"},
}
HEAVY = {"torchvision", "matplotlib", "anywidget", "ipywidgets", "accelerate"}
NEVER = {"models": HEAVY, "crf": HEAVY}


def imports(path):
    """Dotted names that a file imports, also inside functions; a name from the package counts as its module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "segedu":
                yield from (f"segedu.{alias.name}" for alias in node.names)
            else:
                yield node.module


def layer(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    for name in imports(path):
        assert name.split(".")[0] not in NEVER.get(layer(path), set()), f"{path.name} may not import {name}"
        if name.startswith("segedu.") and layer(path) in ALLOWED and path.name != "__init__.py":
            other = name.split(".")[1]
            sideways = other == "models" and (path.stem, name.split(".")[2]) in SIDEWAYS
            assert other in ALLOWED[layer(path)] or sideways, f"{path.name} may not import {name}"


def test_there_are_models():
    assert MODELS


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_names_its_paper_and_chapter(path):
    """The file says its arXiv paper and its chapter; the chapter links back; each class lists its differences."""
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree) or ""
    assert "arxiv.org/abs/" in docstring
    chapter = next(word.rstrip(".,") for word in docstring.split() if word.startswith("chapters/"))
    assert (ROOT / chapter).is_file(), chapter
    file = str(path.relative_to(ROOT))
    assert file in (ROOT / chapter).read_text(), f"{chapter} does not link {file}"
    first = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    text = ast.get_docstring(first) or docstring
    assert "Shape:" in text
    assert "Differences from the paper:" in text


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_layer_works_in_place(path):
    """An in-place ReLU would overwrite the recorded output of the layer before it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            value = keywords.get("inplace")
            assert not (isinstance(value, ast.Constant) and value.value), f"{path.name}:{node.lineno}"


def test_import_is_light():
    heavy = ["torchvision", "matplotlib", "anywidget", "ipywidgets", "scipy"]
    code = f"import sys, segedu; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
