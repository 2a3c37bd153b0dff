"""Sets the address of the repository: `make address URL=https://github.com/ORG/REPO` (empty URL: no address).

Two places carry it, since Colab opens a notebook alone: `_config.yml` and the first code cell of every chapter.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "_config.yml"
FIELD = re.compile(r'^(repository:\n  url: )"(.*)"$', re.M)


def address() -> str:
    """The address in _config.yml, "" where none is set."""
    return FIELD.search(CONFIG.read_text())[2]


def setup_cell(url: str) -> str:
    """The first code cell of a chapter: uses segedu if it is there, else installs it and nothing else."""
    return f"""\
ADDRESS = "{url}"  # of this book's repository; `make address URL=...` sets it
try:
    import segedu as sg
except ImportError:
    assert ADDRESS, "segedu is missing: start with `make lab`, or set ADDRESS"
    %pip install -q --no-deps "segedu @ git+{{ADDRESS}}"
    import segedu as sg"""


def set_address(url: str) -> None:
    if url and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        sys.exit(f"needs an address like https://github.com/ORG/REPO (Colab opens no other), got {url!r}")
    url = url.removesuffix(".git")
    CONFIG.write_text(FIELD.sub(rf'\g<1>"{url}"', CONFIG.read_text()))
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
        first["source"] = setup_cell(url).splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
        print(f"set in {path.relative_to(ROOT)}")
    print(f"address: {url or 'none'}. Commit the change, then `make book`.")


if __name__ == "__main__":
    set_address(sys.argv[1] if len(sys.argv) > 1 else "")
