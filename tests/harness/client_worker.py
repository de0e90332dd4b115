"""A process that works with `loom.client`: python client_worker.py SERVERS AGENT CONCURRENCY WORK_SECONDS LOG.

It appends a line of JSON to the log when a handler begins and ends, and when a claim is reported as lost.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import sys
import time

from loom.client import Cancelled, Client, Fail, Task
from loom.client.clock import now


def main(servers: str, agent: str, concurrency: str, seconds: str, log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(what: str, bead: str, token: int = 0) -> None:
        line = {"what": what, "bead": bead, "token": token, "agent": agent, "pid": os.getpid(), "at": now()}
        os.write(file, json.dumps(line).encode() + b"\n")

    class Lost(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = re.match("claim of (.*) is lost", record.getMessage())
            if found:
                say("lost", found[1])

    logging.getLogger("loom.client").addHandler(Lost())
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)

    def handler(task: Task) -> dict[str, str]:
        say("resumed" if task.resumed else "begin", task.id, task.fencing_token)
        try:
            ends = time.monotonic() + float(seconds) * random.random() * 2
            while time.monotonic() < ends:
                time.sleep(0.02)  # not task.sleep: an ordinary handler
            if task.bead["title"].endswith("7") and task.bead["failures"] == 0:
                raise Fail("the first attempt fails", retry_after_seconds=0)
        except Cancelled:
            say("cancelled", task.id, task.fencing_token)
            raise
        say("end", task.id, task.fencing_token)
        return {"token": str(task.fencing_token)}

    client = Client(servers, attempt_timeout=2.0)
    client.work(agent, handler, concurrency=int(concurrency), lease_seconds=10, grace=1.0)


if __name__ == "__main__":
    main(*sys.argv[1:])
