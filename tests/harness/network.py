"""A network of two hosts on one machine that can drop all packets."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator

import pytest

from harness.processes import program

NOWHERE = "02:00:00:00:00:01"  # the address of no interface
_numbers = itertools.count()


class Network:
    """This host and another at `address`; commands run there when prefixed by `command`."""

    def __init__(self) -> None:
        """Needs root; without it the test is skipped, or fails where CI=true."""
        self._ip = program("ip", "iproute2")
        name = f"loom{os.getpid()}x{next(_numbers)}"[-15:]
        self._name, self._here, self._there = name, f"{name}h"[-15:], f"{name}t"[-15:]
        subnet = f"198.{18 + (os.getpid() >> 14 & 1)}.{os.getpid() >> 6 & 255}"
        host = (os.getpid() & 63) * 4
        ours, self.address = f"{subnet}.{host + 1}", f"{subnet}.{host + 2}"
        self.command = [self._ip, "netns", "exec", name]
        self._ours = ours
        try:
            self._run("netns", "add", name)
            self._run("link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", name)
            self._run("address", "add", f"{ours}/30", "dev", self._here)
            self._run("link", "set", self._here, "up")
            self._run("-n", name, "address", "add", f"{self.address}/30", "dev", self._there)
            self._run("-n", name, "link", "set", self._there, "up")
            self._run("-n", name, "link", "set", "lo", "up")
            subprocess.run([*self.command, "true"], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as exc:
            self.close()
            reason = f"no network namespaces here, which need root: {exc.stderr.strip()}"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Drop all packets in both directions: neither end sees a refusal or a reset."""
        self._run("neighbour", "replace", self.address, "lladdr", NOWHERE, "nud", "permanent", "dev", self._here)
        self._run(
            "-n", self._name, "neighbour", "replace", self._ours, "lladdr", NOWHERE, "nud", "permanent", "dev",
            self._there,
        )  # fmt: skip
        try:
            yield
        finally:
            self._run("neighbour", "del", self.address, "dev", self._here)
            self._run("-n", self._name, "neighbour", "del", self._ours, "dev", self._there)

    def close(self) -> None:
        subprocess.run([self._ip, "netns", "delete", self._name], check=False, capture_output=True)

    def _run(self, *words: str) -> None:
        subprocess.run([self._ip, *words], check=True, capture_output=True, text=True)
