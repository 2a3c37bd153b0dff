"""Links inside the repository lead to files and folders, and links to Colab lead to notebooks that are in git."""

import json
import re
import subprocess
from urllib.parse import unquote

import pytest
from conftest import ROOT

LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "book").glob("*.md"))]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))


def markdown(path):
    """The text of a page, or of a notebook's text cells, without code."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    else:
        text = path.read_text()
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)


@pytest.mark.parametrize("path", PAGES + CHAPTERS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path):
    for link in LINK.findall(markdown(path)):
        if not re.match(r"[a-z]+:|#", link):
            assert (path.parent / unquote(link.split("#")[0])).exists(), f"{path.name} links {link}"


@pytest.mark.parametrize("path", PAGES + CHAPTERS, ids=lambda path: path.name)
def test_foreign_links_are_https(path):
    for link in LINK.findall(markdown(path)):
        assert not link.startswith("http://"), f"{path.name} links {link}"
        assert "github.com/ORG/" not in link and "example.com" not in link, f"{path.name} links {link}"


def build(root, out):
    command = ["make", "-o", ".venv/ready", "-C", root, "book", "SERVE=0", f"OUT={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return {page.name: page.read_text() for page in (out / "_build/html").rglob("*.html")}


@pytest.mark.slow
def test_no_launch_link_without_address(book):
    from address import address

    if address():
        pytest.skip("this copy has an address; the next test looks at its links")
    for page in book.rglob("*.html"):
        assert not re.search(r"colab\.research|executablebooks/jupyter-book|mybinder", page.read_text()), page


@pytest.mark.slow
def test_a_fork_sets_its_address_with_one_command(tmp_path):
    """`make address` in a copy: config, first cells and launch links name it, and each link a notebook in git."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    copy = tmp_path / "fork"
    for name in names.stdout.split():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    (copy / ".venv").symlink_to(ROOT / ".venv")
    url = "https://github.com/some-one/seg.book"
    subprocess.run(["make", "-C", copy, "address", f"URL={url}"], check=True, capture_output=True)
    assert f'url: "{url}"' in (copy / "_config.yml").read_text()
    pages = build(copy, tmp_path / "out")
    links = {name: re.findall(r'href="(https://colab[^"]*)"', text) for name, text in pages.items()}
    for chapter in CHAPTERS:
        stored = json.loads((copy / "chapters" / chapter.name).read_text())
        first = next(cell for cell in stored["cells"] if cell["cell_type"] == "code")
        assert f'ADDRESS = "{url}"' in "".join(first["source"])
        wanted = f"https://colab.research.google.com/github/some-one/seg.book/blob/main/chapters/{chapter.name}"
        assert links[f"{chapter.stem}.html"] == [wanted]
        assert f"chapters/{chapter.name}" in names.stdout.split()
    bad = subprocess.run(["make", "-C", copy, "address", "URL=ftp://x"], capture_output=True, text=True)
    assert bad.returncode != 0 and "https://github.com/ORG/REPO" in bad.stderr
