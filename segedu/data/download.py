"""Downloads that survive a cut line, and archives that are unpacked whole or not at all."""

import shutil
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path, PurePosixPath

TRIES = 3
PAUSE = 2.0  # seconds before the second try, then twice as many


def fetch(url: str, path: Path) -> None:
    """Download `url` to `path`. What has arrived is kept in `path`.part, and a later try or call goes on from there.

    Raises ConnectionError after the last try.
    """
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(TRIES):
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                goes_on = answer.status == 206  # a server that knows no ranges starts again, with status 200
                announced = answer.headers.get("Content-Length")
                with part.open("ab" if goes_on else "wb") as file:
                    shutil.copyfileobj(answer, file)
            if announced is not None and part.stat().st_size != int(announced) + have * goes_on:
                raise ConnectionError("the connection was cut")
            part.replace(path)
            return
        except (OSError, HTTPException) as error:  # URLError and ConnectionError are OSErrors
            reason = error
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:
                part.unlink()  # nothing lies beyond the part: it is not the beginning of this file
        if attempt + 1 < TRIES:
            time.sleep(PAUSE * 2**attempt)
    raise ConnectionError(f"could not download {url}: {reason}")


def unpack(archive: Path, wanted: Callable[[PurePosixPath], PurePosixPath | None], folder: Path) -> None:
    """Write the files of the zip `archive` for which `wanted(name)` gives a path to `folder` / that path.

    Raises ValueError, before anything is written, if a name in the archive points outside of it, and
    zipfile.BadZipFile if the archive or a file in it is damaged (every file's CRC is checked).
    """
    with zipfile.ZipFile(archive) as zipped:
        for name in zipped.namelist():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
                raise ValueError(f"{archive} is not safe to unpack: it holds a file named {name!r}")
        for member in zipped.infolist():
            inside = None if member.is_dir() else wanted(PurePosixPath(member.filename))
            if inside is not None:
                path = folder / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with zipped.open(member) as source, path.open("wb") as file:
                        shutil.copyfileobj(source, file)
                except (zlib.error, EOFError) as error:
                    raise zipfile.BadZipFile(f"{member.filename} is damaged: {error}") from error


def install(archive: Path, wanted: Callable, check: Callable[[Path], None], folder: Path) -> None:
    """Unpack `archive` beside `folder`, run `check` on the result, and only then give it its name."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        fresh = Path(beside) / folder.name
        unpack(archive, wanted, fresh)
        check(fresh)
        if folder.exists():
            folder.rmdir()  # only an empty folder gives way
        fresh.replace(folder)
