"""An agent: python examples/agent.py. It needs `make run` in another shell; `loom bead add` gives it work."""

import os

from loom.client import Client, Task

client = Client(os.environ.get("LOOM_SERVER", "http://localhost:8080"), api_key=os.environ.get("LOOM_API_KEY"))
client.projects.ensure("demo", name="Demo", git_repo="git@example.com:demo.git", branch="main")
client.agents.ensure("coder-1", persona_name="coder", project_id="demo")


def handler(task: Task) -> dict[str, str]:
    """Runs while the claim is kept alive; Cancelled is raised in it when the claim is lost."""
    print(f"{task.id}: {task.bead['title']}", flush=True)
    with client.lock("deploy", ttl=30, wait=60) as lock:  # only one agent at a time
        task.run(["sleep", "0.1"])  # the work; it is killed if the claim is lost
        client.comment_on_bead(task.id, "Deployed", fences=[task, lock])  # refused unless both still hold
    return {"result": "deployed"}  # becomes context of the bead, which is completed


client.work("coder-1", handler, project_id="demo", concurrency=4)  # until SIGTERM or Ctrl-C
