"""A fleet of agents with faults, to watch: `make demo`, or python examples/fleet.py --agents 50 --beads 500.

It creates beads that depend on each other, starts agents in several processes, kills and freezes these processes all
the time, and prints what has happened until every bead is closed. Each is completed once.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

from loom.client import Cancelled, Client, Fail, Task

AGENTS_A_PROCESS = 10
PROJECT = "fleet"


def work(server: str, first: int) -> None:
    """One process with some agents, each a worker in a thread."""
    import threading

    client = Client(server, api_key=os.environ.get("LOOM_API_KEY"))

    def handler(task: Task) -> None:
        try:
            task.sleep(random.uniform(0.1, 1.0))
        except Cancelled:
            print(f"{task.agent} has lost {task.id}", flush=True)
            raise
        if random.random() < 0.05:
            raise Fail("bad luck", retry_after_seconds=1)

    workers = [
        client.worker(f"fleet-{n}", handler, project_id=PROJECT, lease_seconds=10)
        for n in range(first, first + AGENTS_A_PROCESS)
    ]
    for worker in workers:
        threading.Thread(target=worker.run).start()
    signal.signal(signal.SIGTERM, lambda *_: [worker.stop() for worker in workers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default=os.environ.get("LOOM_SERVER", "http://localhost:8080"))
    parser.add_argument("--agents", type=int, default=50)
    parser.add_argument("--beads", type=int, default=500)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process is not None:
        work(options.server, options.process)
        return
    client = Client(options.server, api_key=os.environ.get("LOOM_API_KEY"))
    client.projects.ensure(PROJECT, name="Fleet", git_repo="git@example.com:fleet.git", branch="main")
    for n in range(options.agents):
        client.agents.ensure(f"fleet-{n}", persona_name="worker", project_id=PROJECT)
    ids: list[str] = []
    for first in range(0, options.beads, 100):
        beads = [
            {
                "title": f"Task {n}",
                "project_id": PROJECT,
                "priority": random.randrange(4),
                "blocked_by": random.sample(ids, min(len(ids), random.choice((0, 0, 1, 2)))),
            }
            for n in range(first, min(first + 100, options.beads))
        ]
        ids += [bead["id"] for bead in client.create_beads(beads)]

    def start(first: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, __file__, "--process", str(first), "--server", options.server],
            stderr=subprocess.DEVNULL,
        )

    processes = {first: start(first) for first in range(0, options.agents, AGENTS_A_PROCESS)}
    mine = set(ids)
    try:
        while True:
            counts = Counter(b["status"] for b in client.beads.list(project_id=PROJECT) if b["id"] in mine)
            print(dict(counts), flush=True)
            if counts["closed"] == len(ids):
                break
            time.sleep(2)
            first = random.choice(list(processes))
            if random.random() < 0.5:
                print(f"kill the process of agents {first} to {first + AGENTS_A_PROCESS - 1}", flush=True)
                processes[first].kill()
                processes[first].wait()
                processes[first] = start(first)
            elif random.random() < 0.3:
                print(f"freeze the process of agents {first} to {first + AGENTS_A_PROCESS - 1} for 12 s", flush=True)
                processes[first].send_signal(signal.SIGSTOP)
                time.sleep(12)
                processes[first].send_signal(signal.SIGCONT)
    finally:
        for process in processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in processes.values():
            process.wait()
    completed = Counter(e.entity_id for id in ids for e in client.beads.history(id) if e.type == "bead.completed")
    print(f"{len(ids)} beads, each completed once: {completed == Counter(ids)}")


if __name__ == "__main__":
    main()
