"""The rendered book, as a reader's browser sees it: nothing foreign, nothing broken, nothing unreadable."""

import re
from urllib.parse import urlparse

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT

pytestmark = pytest.mark.slow

PAGES = re.findall(r"^\s*-? ?(?:file|root): (\S+)", (ROOT / "_toc.yml").read_text(), re.M)
MAX_BYTES = 3_000_000  # of one page on the wire, without its pictures


class Visit:
    """One opened page with what the browser complained about and asked for."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.errors, self.hosts, self.bytes = [], set(), 0
        self.page.on(
            "console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text)
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlparse(request.url).hostname))
        self.page.on("response", self.count)
        self.page.goto(url, wait_until="networkidle")

    def count(self, response):
        if response.status >= 400:
            self.errors.append(f"{response.status} {response.url}")
        elif not response.headers.get("content-type", "").startswith("image/") or response.url.endswith(".svg"):
            self.bytes += int(response.headers.get("content-length", 0))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.context.close()


def accessible(page):
    """Call it last: axe asks for style sheets again, and for one that is not there."""
    violations = Axe().run(page).response["violations"]
    assert not violations, [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in violations]
    return True


def test_toc_names_pages():
    assert len(PAGES) >= 9
    assert {"book/intro", "chapters/01_measuring", "chapters/02_fcn"} <= set(PAGES)


def test_build_has_no_warning(book):
    log = (book.parents[1] / "build.log").read_text()
    assert "build succeeded." in log
    assert not re.findall(r"warning:", log, re.I)
    assert not (book / "reports").exists()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_page(name, scheme, serve, browser):
    with Visit(browser, f"{serve}/{name}.html", color_scheme=scheme) as visit:
        assert visit.page.evaluate("document.documentElement.dataset.theme") == scheme
        assert visit.errors == []
        assert visit.hosts == {"127.0.0.1"}
        assert visit.bytes < MAX_BYTES, f"{visit.bytes} bytes without pictures"
        for picture in visit.page.query_selector_all("article img"):
            alt = picture.get_attribute("alt") or ""
            assert len(alt) >= 10 and not re.search(r"\.(png|svg|jpe?g)$", alt), picture.get_attribute("src")
        assert accessible(visit.page)


@pytest.mark.parametrize("name", [*PAGES, "search", "genindex", "index"])
def test_page_on_a_phone(name, serve, browser):
    with Visit(browser, f"{serve}/{name}.html", viewport={"width": 390, "height": 844}) as visit:
        assert visit.errors == []
        assert visit.hosts == {"127.0.0.1"}
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
        if name in PAGES:
            assert accessible(visit.page)


@pytest.mark.parametrize("name", ["book/intro", "chapters/01_measuring", "chapters/02_fcn"])
def test_page_opens_from_a_folder(name, book, browser):
    with Visit(browser, (book / f"{name}.html").as_uri()) as visit:
        assert visit.errors == []
        assert visit.hosts == {None}


def test_maths_is_set_by_our_own_mathjax(serve, browser):
    with Visit(browser, f"{serve}/book/notation.html") as visit:
        visit.page.wait_for_selector("mjx-container mjx-math")
        assert visit.page.evaluate("MathJax.version") == "3.2.2"
        assert visit.page.locator("mjx-merror").count() == 0


def test_search_finds_a_word(serve, browser):
    with Visit(browser, f"{serve}/search.html?q=void") as visit:
        visit.page.wait_for_selector("#search-results li a")
        assert visit.errors == []
        assert any("glossary" in a.get_attribute("href") for a in visit.page.query_selector_all("#search-results li a"))
