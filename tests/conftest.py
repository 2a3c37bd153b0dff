"""Fixtures for the built book: `book` (its folder), `serve` (its address), `browser` (a headless Chromium); `shaken`."""

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: opens a browser, builds the book or trains; not in `make check`")


def shaken(net):
    """Batch norm with statistics of its own, as after training; evaluation mode."""
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.2)
            part.running_var.uniform_(0.5, 2)
    return net.eval()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Path:
    """The folder of the freshly built book. The build fails on any warning."""
    out = tmp_path_factory.mktemp("book")
    command = ["make", "-o", ".venv/ready", "book", "SERVE=0", f"OUT={out}"]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (out / "build.log").write_text(build.stdout + build.stderr)
    assert build.returncode == 0, (build.stdout + build.stderr)[-5000:]
    return out / "_build/html"


@pytest.fixture(scope="session")
def serve(book) -> str:
    """The address at which the built book is served, without a slash at the end."""
    handler = functools.partial(QuietHandler, directory=book)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; `make test` installs it."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here: `make chromium` installs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        yield browser
        browser.close()
