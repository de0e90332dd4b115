"""A bead in the hands of a handler."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

from loom.client import errors
from loom.client.lease import Lease
from loom.client.values import Claim, Json

KILL_SECONDS = 1.0  # from SIGTERM to SIGKILL: a handler must not go on for 2 s after its claim was lost


class GiveBack(Exception):
    """Raised by a handler: the bead is open again, as if it had never been claimed."""


class Fail(Exception):
    """Raised by a handler: the attempt failed. Any other exception does the same, with the default delay."""

    def __init__(self, reason: str, retry_after_seconds: int | None = None) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds


class Cancelled(BaseException):
    """Raised in a handler whose claim is lost, or which is to end because the process stops.

    Not an Exception, so that a handler's own `except Exception` does not swallow it.
    """


class Task:
    """A claimed bead. It can fence writes, as a lock can: `lock_name`, `fencing_token`.

    When the claim is lost, `lost` is true at once, and Cancelled is raised in the handler: immediately in `sleep`,
    `run` and `ensure`, otherwise when its thread next runs Python code. A call that blocks elsewhere (a socket, a
    sleep of `time`) ends first: give it a time-out.
    """

    def __init__(self, claim: Claim, agent: str, sent: float, resumed: bool) -> None:
        self.bead, self.agent, self.fencing_token, self.resumed = claim.bead, agent, claim.fencing_token, resumed
        self.id: str = claim.bead["id"]
        self.lock_name = claim.lock_name
        self.lease_seconds: int = claim.bead["lease_seconds"]
        self.lease = Lease(f"claim of {self.id}", self.cancel)
        self.lease.extend(sent, self.lease_seconds)
        self.reported = False
        self._cancelled = threading.Event()
        self._guard = threading.Lock()
        self._thread: int | None = None

    @property
    def lost(self) -> bool:
        """Whether it is unsure that the claim still holds."""
        return self.lease.lost

    @property
    def cancelled(self) -> bool:
        """Whether the handler is to end: the claim is lost, or the process stops."""
        return self._cancelled.is_set()

    def ensure(self) -> None:
        """Raises Cancelled unless the claim certainly holds now."""
        if self.lost or self.cancelled:
            raise Cancelled

    def sleep(self, seconds: float) -> None:
        """Raises Cancelled as soon as the handler is to end."""
        self._cancelled.wait(seconds)
        self.ensure()

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """As subprocess.run, in a process group of its own, which ends when the handler is to end. Raises Cancelled."""
        stdin, timeout, check = options.pop("input", None), options.pop("timeout", None), options.pop("check", False)
        if options.pop("capture_output", False):
            options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if stdin is not None:
            options["stdin"] = subprocess.PIPE
        process = subprocess.Popen(command, start_new_session=True, **options)
        ended = threading.Event()
        killer = threading.Thread(target=self._kill_when_cancelled, args=(process, ended), daemon=True)
        killer.start()
        try:
            out, err = process.communicate(stdin, timeout=timeout)
        except BaseException:
            _signal(process, signal.SIGKILL)
            process.wait()
            raise
        finally:
            ended.set()
        self.ensure()
        done = subprocess.CompletedProcess(command, process.returncode, out, err)
        if check:
            done.check_returncode()
        return done

    def _kill_when_cancelled(self, process: subprocess.Popen[Any], ended: threading.Event) -> None:
        while not ended.is_set() and not self._cancelled.wait(0.2):
            pass
        if not ended.is_set():
            _signal(process, signal.SIGTERM)
            if not ended.wait(KILL_SECONDS):
                _signal(process, signal.SIGKILL)

    def call(self, handler: Any) -> Json | None:
        """Run the handler so that `cancel` can end it."""
        with self._guard:
            self._thread = threading.get_ident()
        try:
            self.ensure()
            return handler(self)
        finally:
            with self._guard:
                ident, self._thread = self._thread, None
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident or 0), None)  # if it is still pending

    def cancel(self) -> None:
        """Make the handler end. It gets one Cancelled, at its next step in Python."""
        with self._guard:
            if not self._cancelled.is_set() and self._thread is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(Cancelled))
            self._cancelled.set()


def _signal(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


Outcome = tuple[str, dict[str, Any]]  # the call that reports it, and its arguments


def outcome_of(task: Task, handler: Any) -> Outcome:
    """Run the handler, and return how it ended: complete, fail, release, or nothing for a claim that is lost."""
    try:
        result = task.call(handler)
    except Cancelled:
        return "release", {"reason": "the worker stops"}
    except GiveBack as exc:
        return "release", {"reason": str(exc) or None}
    except Fail as exc:
        return "fail", {"reason": str(exc), "retry_after_seconds": exc.retry_after_seconds}
    except (errors.ClaimLost, errors.LockLost) as exc:
        return "release", {"reason": str(exc)}  # a fenced write of the handler was refused
    except BaseException as exc:
        return "fail", {"reason": f"{type(exc).__name__}: {exc}"[:10_000]}
    if result is not None and not isinstance(result, dict):
        return "fail", {"reason": f"the handler returned {type(result).__name__}, not None or a dict of context"}
    return "complete", {"context": result} if result else {}
