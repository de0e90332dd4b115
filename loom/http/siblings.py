"""Several workers of one gunicorn share a port, so that a scrape reaches any one of them; it answers for all.

Each leaves what it counts in a file, every few seconds and before each scrape that it answers: so that no number goes
back from one scrape to the next. With one worker, which is the rule, there is no folder and none of this.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

_folder: Path | None = None
_sharing = threading.Lock()


def open_folder() -> None:
    """In the master, before the workers are forked."""
    global _folder
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="loom-metrics-"))


def remove_folder() -> None:
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)


def shared() -> bool:
    return _folder is not None


def forget(pid: int) -> None:
    """In the master: the worker has ended."""
    if _folder is not None:
        (_folder / str(pid)).unlink(missing_ok=True)


def share(make: Callable[[], str]) -> str:
    """Makes the metrics of this worker, and leaves them for its siblings. Of two texts the later one stays."""
    if _folder is None:
        return make()
    with _sharing:
        text = make()
        with contextlib.suppress(OSError):  # no space left, for example: then this worker is missing in others' answers
            new = _folder / f"new-{os.getpid()}"
            new.write_text(text)
            new.replace(_folder / str(os.getpid()))
    return text


def with_siblings(text: str) -> str:
    """The metrics of this worker, and those that its siblings have left."""
    if _folder is None:
        return text
    texts = [text]
    for file in _folder.glob("[0-9]*"):
        if file.name != str(os.getpid()):
            with contextlib.suppress(FileNotFoundError):  # it has just ended
                texts.append(file.read_text())
    return merged(texts)


def merged(texts: Iterable[str]) -> str:
    """One text for several: each metric has its description once, and the samples of all."""
    families: dict[str, list[str]] = {}
    for text in texts:
        for family in text.split("# HELP ")[1:]:
            description, kind, samples = family.split("\n", 2)
            families.setdefault(f"# HELP {description}\n{kind}\n", []).append(samples)
    return "".join(head + "".join(samples) for head, samples in families.items())
