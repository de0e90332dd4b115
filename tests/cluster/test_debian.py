"""deploy/debian/install on this host, in a mount namespace with copies of /etc and /opt: nothing of it stays."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import Postgres, program
from harness.cluster import ROOT
from harness.postgres import SUPERUSER

COPIES = """
set -eu
mount -t tmpfs none {folder}
for path in /etc /opt; do
    mkdir -p {folder}$path/upper {folder}$path/work
    mount -t overlay -o lowerdir=$path,upperdir={folder}$path/upper,workdir={folder}$path/work overlay $path
done
mount -t tmpfs none /run
kept() {{ find /etc/loom* /etc/systemd/system /etc/nginx/conf.d /opt/loom* ! -name '*.pyc' -exec ls -ld {{}} +; }}
state() {{ kept | sha256sum; }}
"""
INSTALL = """
cd {source}
deploy/debian/install 8080 8081 8082
readlink /opt/loom.releases/current > {folder}/first
state > {folder}/before
deploy/debian/install 8080 8081 8082
state | cmp - {folder}/before && echo "the second run changed nothing"
stat -c '%a %n' /etc/loom/*
ls /etc/systemd/system/loom.target.wants
echo "DATABASE_DSN={dsn}" > /etc/loom/loom.env
echo "LOOM_SERVER__ALLOWED_HOSTS=loom.example.com" >> /etc/loom/loom.env
"""
# What systemd does with the unit, as a user that exists only for this; on its own loopback, since the ports are fixed.
SERVE = """
cat > {folder}/serve <<'SERVE'
set -eu
ip link set lo up
unit=/etc/systemd/system/loom@.service
echo loom:x:61234:61234::/:/bin/false >> /etc/passwd  # as systemd answers for a DynamicUser
values() {{ sed -n "s/^$1=//p" $unit | sed "s/%i/$port/g"; }}
as_loom() {{ setpriv --reuid=61234 --regid=61234 --clear-groups --no-new-privs --bounding-set=-all -- \
    env -i PATH=/usr/bin:/bin $(values Environment) $(cat $(values EnvironmentFile)) "$@"; }}
mkdir {folder}/state && chown 61234 {folder}/state && cd {folder}/state
for port in 8080 8081 8082; do
    as_loom $(values ExecStart) > {folder}/$port.log 2>&1 &
done
nginx
for port in 8080 8081 8082; do
    curl -sf --retry 20 --retry-delay 1 --retry-all-errors -o {folder}/$port.json localhost:$port/health ||
        cat {folder}/$port.log
done
port=8081
as_loom $(values ExecReload | head -1)
curl -s -H 'Host: loom.example.com' localhost/api/v1/locks/x -d '{{}}'; echo
for i in 1 2 3 4 5 6 7 8 9 10; do
    curl -s localhost:8080/health | grep '"active_instances": *3' && break
    sleep 0.5
done
for process in /proc/[0-9]*; do  # jobs are shells, whose end would leave the instances
    [ "$(stat -c %u $process 2>/dev/null)" != 61234 ] || kill ${{process#/proc/}}
done
nginx -s quit
wait
SERVE
unshare --net bash {folder}/serve
"""
UPGRADE = """
cp -R {source} {folder}/newer
echo '# newer' >> {folder}/newer/loom/__init__.py
{folder}/newer/deploy/debian/install
cmp -s {folder}/first <(readlink /opt/loom.releases/current) || echo "the newer release is current"
grep -c newer /opt/loom/lib/python3*/site-packages/loom/__init__.py
deploy/debian/install --rollback
cmp {folder}/first <(readlink /opt/loom.releases/current) && echo "the former release is current"
grep -c newer /opt/loom/lib/python3*/site-packages/loom/__init__.py || true
"""


@pytest.fixture
def source(folder: Path) -> Path:
    unwanted = shutil.ignore_patterns(".venv", "var", ".git", "__pycache__", "*.egg-info", "config.yaml")
    return shutil.copytree(ROOT, folder / "source", ignore=unwanted)


def run(script: str, folder: Path, **values: object) -> str:
    if os.geteuid() != 0:
        pytest.skip("only root can have a mount namespace of its own")
    for name, package in (("nginx", "nginx"), ("curl", "curl"), ("ip", "iproute2"), ("systemctl", "systemd")):
        program(name, package)
    (folder / "copies").mkdir()
    text = (COPIES + script).format(folder=folder / "copies", **values)
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

    def in_namespace(commands: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "--mount", "bash", "-c", commands],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=300,
        )

    allowed = in_namespace(COPIES.format(folder=folder / "copies"))
    if allowed.returncode != 0:
        pytest.skip(f"this machine allows no mounts: {allowed.stdout.strip()[-200:]}")
    done = in_namespace(text)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.all
def test_an_installation_serves_on_three_ports_behind_nginx_and_may_be_repeated(
    source: Path, folder: Path, own_postgres: Postgres
) -> None:
    for path in (folder, own_postgres.folder):  # pytest closes its own folders to other users
        path.chmod(0o755)
    server, name = own_postgres, own_postgres.empty_database()
    dsn = f"postgresql://{SUPERUSER}@/{name}?host={server.folder}&port={server.port}"
    said = run(INSTALL + SERVE + UPGRADE, folder, source=source, dsn=dsn)
    print(said)
    for line in (
        "the second run changed nothing",
        "644 /etc/loom/config.yaml",
        "600 /etc/loom/loom.env",
        "loom@8082.service",
        '"active_instances":3',
        '"lock_name":"x"',
        "# environment PORT",
        "the newer release is current\n1",
        "the former release is current\n0",
    ):
        assert line in said.replace(": ", ":") or line in said


@pytest.mark.all
def test_a_port_that_is_no_number_and_a_rollback_without_a_release_are_refused(source: Path, folder: Path) -> None:
    said = run(
        "cd {source}; deploy/debian/install http || deploy/debian/install --rollback || true", folder, source=source
    )
    assert "a port is a number, not http" in said
    assert "there is no release before this one" in said
