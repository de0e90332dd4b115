"""`loom lock run`: a command that runs while a lock is held, and a guard that ends it when that is over.

The guard is a process of its own. It learns over a pipe until when the lock may be trusted, and ends the command's
process group when that moment is over, or when the pipe is closed: so the command also ends when this process is
killed, or is stopped for longer than the TTL.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

import click

from loom.cli import _remote
from loom.client import clock, errors
from loom.client.lock import Lock
from loom.config import environment

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
MESSAGE = struct.Struct("=qd")  # the process group (0: none any more), and until when the lock may be trusted


def run(lock: Lock, wait: float, ttl: int, command: Sequence[str]) -> int:
    """Run the command under the lock, and return the exit status. Raises errors of the lock."""
    grace = ttl / 3
    pipe = _start_guard(grace)  # before there are threads: it is a fork
    try:
        lock.acquire(wait)
    except errors.LockHeld as exc:
        click.echo(f"Error: {exc}", err=True)
        return _remote.NOT_ACQUIRED
    try:
        status = _run(lock, grace, command, pipe)
    finally:
        os.close(pipe)
        with contextlib.suppress(errors.LockLost):
            lock.release()
    return status


def _run(lock: Lock, grace: float, command: Sequence[str], pipe: int) -> int:
    env = environment(LOOM_FENCING_TOKEN=str(lock.fencing_token), LOOM_LOCK_NAME=lock.lock_name)
    waiting: list[int] = []  # signals that arrive before the command has started
    before = {number: signal.signal(number, lambda got, _: waiting.append(got)) for number in FORWARDED}
    terminal = _terminal()
    try:
        child = subprocess.Popen(command, env=env, preexec_fn=lambda: _in_own_group(terminal), restore_signals=True)
    except FileNotFoundError as exc:
        click.echo(f"Error: {command[0]}: {exc.strerror}", err=True)
        return 127
    except OSError as exc:
        click.echo(f"Error: {command[0]}: {exc.strerror}", err=True)
        return 126
    group = child.pid

    def forward(number: int, _: FrameType | None) -> None:
        _kill(group, signal.Signals(number))

    for number in FORWARDED:
        signal.signal(number, forward)
    for got in waiting:
        forward(got, None)
    killed_at = None
    try:
        while True:
            _tell(pipe, group, clock.now() + lock.left)
            ended = True
            try:
                child.wait(min(0.5, max(0.02, lock.left)))
            except subprocess.TimeoutExpired:
                ended = False
            if lock.lost and killed_at is None:
                killed_at = time.monotonic() + grace
                click.echo(f"loom: lock {lock.lock_name} is lost; ending the command", err=True)
                _kill(group, signal.SIGTERM)
            if killed_at is not None and (time.monotonic() >= killed_at or not _alive(group)):
                _kill(group, signal.SIGKILL)
                child.wait()
                return _remote.LOST
            if ended and killed_at is None:
                break
        _tell(pipe, 0, 0.0)
    finally:
        if terminal is not None:
            _to_foreground(terminal, os.getpgrp())
        for number, handler in before.items():
            signal.signal(number, handler)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _start_guard(grace: float) -> int:
    """Fork the guard, and return the end of the pipe that it listens to."""
    assert threading.active_count() == 1
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            os.close(write)
            os.setsid()  # Ctrl-C on the terminal is not for it
            _guard(read, grace)
        finally:
            os._exit(0)
    os.close(read)
    return write


def _tell(pipe: int, group: int, until: float) -> None:
    with contextlib.suppress(BrokenPipeError):  # it has ended, and has ended the command
        os.write(pipe, MESSAGE.pack(group, until))


def _guard(pipe: int, grace: float) -> None:
    os.closerange(0, pipe)  # nobody who reads the command's output waits for the guard
    os.closerange(pipe + 1, 256)
    group, until = 0, 0.0
    while True:
        timeout = max(0.0, min(0.5, until - clock.now())) if group else None
        if select.select([pipe], [], [], timeout)[0]:
            message = os.read(pipe, MESSAGE.size)
            if len(message) < MESSAGE.size:  # the holder has ended
                break
            group, until = MESSAGE.unpack(message)
        elif group and clock.now() >= until:
            break
    if group:
        _kill(group, signal.SIGTERM)
        ends = clock.now() + grace
        while clock.now() < ends and _alive(group):
            time.sleep(0.02)
        _kill(group, signal.SIGKILL)


def _kill(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _alive(group: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, 0)
        return True
    return False


def _terminal() -> int | None:
    """The terminal, if this process is in its foreground: then the command must be."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp():
            return sys.stdin.fileno()
    return None


def _in_own_group(terminal: int | None) -> None:
    os.setpgid(0, 0)
    if terminal is not None:
        _to_foreground(terminal, os.getpgrp())


def _to_foreground(terminal: int, group: int) -> None:
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.tcsetpgrp(terminal, group)
    signal.signal(signal.SIGTTOU, before)
