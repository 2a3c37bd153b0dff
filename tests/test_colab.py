"""Each chapter alone in an empty folder, with the Python and the package versions of Google Colab.

Colab itself is not reached: its versions (googlecolab/backend-info, 2026-08-19) are installed into a second environment,
`google.colab` is a stub, and git answers the chapter's address with this working tree.
"""

import json
import os
import subprocess
from pathlib import Path

import freeze
import nbformat
import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

ADDRESS = "https://github.com/some-one/segedu"
PYTHON = "3.13"
PINS = (
    "pip==24.1.2 setuptools==75.2.0 ipykernel==6.17.1 ipython==7.34.0 traitlets==5.7.1 ipywidgets==7.7.1 "
    "anywidget==0.9.21 torch==2.11.0 torchvision==0.26.0 numpy==2.1.3 scipy==1.16.3 matplotlib==3.10.0 "
    "pillow==11.3.0 scikit-image==0.25.2 accelerate safetensors tqdm"
)
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))


def call(*command, **options):
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def runs(python):
    try:
        return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture(scope="session")
def colab():
    """The Python of an environment with Colab's versions, kept in .venv/colab."""
    uv = ROOT / ".venv/bin/uv"
    candidates = [f"python{PYTHON}", *Path.home().glob(f".pyenv/versions/{PYTHON}*/bin/python{PYTHON}")]
    python = next(filter(runs, candidates), None)
    if python is None:
        pytest.skip(f"no Python {PYTHON} on this machine")
    folder = ROOT / ".venv/colab"
    stamp = folder / "pins.txt"
    if not stamp.exists() or stamp.read_text() != PINS:
        call(uv, "venv", "-q", "--clear", "--seed", "-p", python, folder)
        call(uv, "pip", "install", "-q", "-p", folder / "bin/python", *PINS.split())
        stamp.write_text(PINS)
    return folder / "bin/python"


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A git repository of the working tree, as a fork would have pushed it."""
    folder = tmp_path_factory.mktemp("published")
    for name in call("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).split():
        if (ROOT / name).is_file() and name.startswith(
            ("segedu/", "results/", "pyproject.toml", "README.md", "LICENSE")
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", folder]
    call(*git, "init", "-q")
    call(*git, "add", "-A")
    call(*git, "commit", "-q", "-m", "published")
    return folder


@pytest.fixture
def runtime(colab, published, tmp_path, monkeypatch):
    """Environment variables of a kernel named `colab` that has no segedu yet."""
    subprocess.run([ROOT / ".venv/bin/uv", "pip", "uninstall", "-q", "-p", colab, "segedu"], capture_output=True)
    spec = tmp_path / "jupyter/kernels/colab"
    spec.mkdir(parents=True)
    argv = [str(colab), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "colab", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    stub = tmp_path / "stub/google/colab"
    stub.mkdir(parents=True)
    (stub / "output.py").write_text("def enable_custom_widget_manager():\n    pass\n")
    (tmp_path / "stub/sitecustomize.py").write_text("import google.colab.output\n")
    return {
        "PYTHONPATH": str(tmp_path / "stub"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{published.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": ADDRESS,
    }


def versions(python):
    return call(ROOT / ".venv/bin/uv", "pip", "freeze", "-p", python).splitlines()


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_runs_alone(path, colab, runtime, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell["cell_type"] == "code")
    first["source"] = freeze.setup_cell(ADDRESS)
    before = versions(colab)
    folder = tmp_path / "empty"
    folder.mkdir()
    freeze.run(notebook, folder, "colab", **runtime)
    assert not [out for cell in notebook.cells for out in cell.get("outputs", []) if out["output_type"] == "error"]
    assert {line for line in versions(colab) if not line.startswith("segedu")} == set(before)
    assert any(line.startswith("segedu") for line in versions(colab))


def test_without_address_the_first_cell_says_what_to_do(colab, runtime, tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(freeze.setup_cell(""))])
    with pytest.raises(Exception, match="segedu is missing: start with `make lab`, or set ADDRESS"):
        freeze.run(notebook, tmp_path, "colab", **runtime)
