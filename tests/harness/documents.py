"""The code blocks of README.md and docs/, and a shell that runs them as a reader does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.cluster import ROOT
from harness.postgres import binaries

COMMANDS = {"sh", "sql", "python"}  # these run; `output` is what the block before it prints
OTHER = {"text", "json", "yaml", "ini", "dockerfile"}  # these do not
FENCE = re.compile(r" *```(?P<language>.*)")
TESTED_BY = re.compile(r" *<!-- tested by (?P<tests>.*) -->")
COMMAND = re.compile(r"^ *(\$ |curl |psql |make |loom [a-z]|systemctl |SELECT |UPDATE |DELETE )", re.MULTILINE)
SECONDS = 60  # for all blocks of one document
END = "--- end of block, status"


@dataclass(frozen=True)
class Block:
    """A fenced block: `line` is the number of its first line, `tests` cover it when it does not run."""

    line: int
    language: str
    text: str
    tests: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        return self.language in COMMANDS and not self.tests


@dataclass(frozen=True)
class Ran:
    """A block that ran, the output that the document shows (None: no output), and the real one."""

    block: Block
    shown: str | None
    printed: str
    status: int

    @property
    def fault(self) -> str | None:
        """Why the block is wrong, or None."""
        if self.status:
            return f"ends with status {self.status}"
        if self.shown is None:
            return "is refused, which the document does not show" if '"/problems/' in self.printed else None
        return None if matches(self.shown, self.printed) else f"does not print what the document shows:\n{self.shown}"


def blocks(markdown: str) -> list[Block]:
    """Return the fenced blocks of a document, in order."""
    found: list[Block] = []
    lines = markdown.splitlines()
    start: int | None = None
    language = ""
    for number, line in enumerate(lines):
        fence = FENCE.fullmatch(line)
        if fence and start is None:
            start, language = number, fence["language"]
        elif fence and start is not None:
            mark = TESTED_BY.fullmatch(lines[start - 1])
            text = textwrap.dedent("\n".join(lines[start + 1 : number]) + "\n")
            found.append(Block(start + 2, language, text, tuple(mark["tests"].split(", ")) if mark else ()))
            start = None
    return found


def unclear(markdown: str) -> list[str]:
    """Return a message with the line for each possible command that is in no block of a known language."""
    lines = markdown.splitlines()
    known = COMMANDS | OTHER | {"output"}
    faults = []
    inside = False
    for number, line in enumerate(lines):
        inside ^= FENCE.fullmatch(line) is not None
        if not inside and line.startswith("    ") and line.strip() and not lines[number - 1].strip():
            faults.append(f"line {number + 1}: an indented block, not one between ```")
    before = None
    for block in blocks(markdown):
        if block.language == "output" and not (before and before.runs):
            faults.append(f"line {block.line}: an output, but the block before it does not run")
        before = block
        if block.language not in known:
            faults.append(f"line {block.line}: a block of {block.language!r}, not of {sorted(known)}")
        if block.language in OTHER and COMMAND.search(block.text):
            faults.append(f"line {block.line}: a command in a block of {block.language!r}, which does not run")
    return faults


def is_test(name: str) -> bool:
    """Whether a test exists, named as in pytest: tests/service/test_locks.py::test_x."""
    path, _, function = name.partition("::")
    file = ROOT / path
    return file.is_file() and re.search(rf"^def {re.escape(function)}\(", file.read_text(), re.MULTILINE) is not None


def with_outputs(found: Sequence[Block]) -> list[tuple[Block, str | None]]:
    """Return the blocks that run, each with the `output` block that follows it."""
    following = [*found[1:], None]
    return [
        (block, after.text if after and after.language == "output" else None)
        for block, after in zip(found, following, strict=True)
        if block.runs
    ]


def matches(shown: str, printed: str) -> bool:
    """Whether a program printed what a document shows. White space does not count.

    In what is shown, `…` stands for any text, or none (then without its comma), and `<word>` for one value: text
    without a comma, a quote or a bracket.
    """
    wildcards = {"…": ".*?", ",…": "(?:,.*?)?", "…,": "(?:.*?,)?", ",…,": ",(?:.*?,)?"}
    pattern = ""
    for part in re.split(r"(,?…,?|<[a-z-]+>)", re.sub(r"\s", "", shown)):
        if re.fullmatch("<[a-z-]+>", part):
            pattern += r'[^,"()\[\]{}]+?'
        else:
            pattern += wildcards.get(part) or re.escape(part)
    return re.fullmatch(pattern, re.sub(r"\s", "", printed), re.DOTALL) is not None


def checkout(folder: Path) -> None:
    """Make `folder` look like a checkout in which `make` has installed Loom."""
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".venv", "var", "config.yaml"):
            (folder / entry.name).symlink_to(entry)
    (folder / ".venv").mkdir()
    (folder / ".venv/bin").symlink_to(Path(sys.executable).parent)
    for stamp in ("embedded", "test", "all", "bench", "node_modules"):  # newer than setup.cfg: make installs nothing
        (folder / ".venv" / stamp).touch()


def run(
    pairs: Sequence[tuple[Block, str | None]], folder: Path, env: Mapping[str, str], ports: Mapping[int, int]
) -> list[Ran]:
    """Run blocks in one shell, in order, as if pasted into it. `ports`: those of the document, and the real ones."""
    home, work = folder / "home", folder / "checkout"
    home.mkdir()
    work.mkdir()
    checkout(work)
    (home / ".curlrc").write_text("silent\nshow-error\n")  # as on a terminal: no progress meter
    script = [f"cd {work}"]
    for number, (block, _) in enumerate(pairs):
        file = folder / f"{number}.{block.language}"
        file.write_text(_replace(block.text, ports))
        command = {
            "sh": f". {file}",
            "sql": f"psql -X -v ON_ERROR_STOP=1 loom -f {file}",
            "python": f"{sys.executable} {file}",
        }[block.language]
        script.append(f'{command}; echo "{END} $?"')
    shell = [shutil.which("bash") or "bash", "-c", "\n".join(script)]
    path = f"{Path(sys.executable).parent}:{binaries()}:/usr/local/bin:/usr/bin:/bin"
    process = subprocess.run(
        shell,
        env={"PATH": path, "HOME": str(home), "TMPDIR": str(home), "LC_ALL": "C.UTF-8", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    printed = _replace(process.stdout, {real: shown for shown, real in ports.items()})
    parts = re.split(rf"{END} (\d+)\n", printed)
    assert len(parts) == 2 * len(pairs) + 1, f"the shell ended early:\n{printed}"
    return [Ran(block, shown, parts[2 * i], int(parts[2 * i + 1])) for i, (block, shown) in enumerate(pairs)]


def _replace(text: str, ports: Mapping[int, int]) -> str:
    return re.sub(r"\b\d{4,5}\b", lambda number: str(ports.get(int(number[0]), number[0])), text)
