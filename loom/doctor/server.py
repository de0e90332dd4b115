"""How the PostgreSQL server is set up, and what its other sessions do."""

from __future__ import annotations

import ipaddress
import os
import socket
import time

from loom.db import Row
from loom.doctor.look import Look, Result, ok, unchecked, wrong
from loom.overview import span

# Connections of an instance beside its pool: heartbeat, upkeep, its lock, metrics, waiters for locks and for events.
DEDICATED = 6
NO_RIGHT = "the role may not see other roles' sessions: GRANT pg_monitor TO {role}"


def version(look: Look) -> Result:
    row = look.row("SELECT current_setting('server_version') AS name, current_setting('server_version_num')::int AS no")
    oldest, newest = look.limits.oldest_server, look.limits.newest_server
    if not oldest <= row["no"] // 10_000 <= newest:
        return wrong(f"PostgreSQL {row['name']}; Loom runs on {oldest} to {newest}", "pg_upgrade, or another Loom")
    return ok(f"PostgreSQL {row['name']}")


def tls(look: Look) -> Result:
    assert look.connection is not None
    info = look.connection.raw.info
    if info.ssl_in_use:
        return ok(f"{info.ssl_attribute('protocol')}, {info.ssl_attribute('cipher')}")
    if not info.host or info.host.startswith(("/", "@")):
        return ok("not needed on a Unix socket")
    with socket.socket(fileno=os.dup(look.connection.raw.fileno())) as link:
        address = str(link.getpeername()[0])
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return ok("not needed on this host")
    return wrong(
        f"the connection to {info.host} is not encrypted",
        "add sslmode=require (or verify-full) to database.dsn; on the server:"
        " ALTER SYSTEM SET ssl = on, with a certificate",
    )


def clock(look: Look) -> Result:
    assert look.connection is not None
    best, difference = float("inf"), 0.0
    for _ in range(3):
        sent = time.time()
        (row,) = look.connection.execute("SELECT extract(epoch FROM clock_timestamp())::float AS now")
        took = time.time() - sent
        if took < best:
            best, difference = took, row["now"] - sent - took / 2
    if abs(difference) - best / 2 <= look.limits.clock_seconds:
        return ok(f"{abs(difference):.2f} s between this host and the database")
    which = "ahead of" if difference > 0 else "behind"
    return wrong(
        f"the clock of the database is {span(abs(difference))} {which} that of this host; only the database's decides,"
        " but times in logs and of clients do not fit",
        "timedatectl set-ntp true, on the host whose clock is wrong",
    )


def connections(look: Look) -> Result:
    """Whether all instances can fill their pools; it takes their settings to be those of this host."""
    assert look.connection is not None
    row = look.row(
        """
        SELECT pg_backend_pid() AS pid, current_setting('max_connections')::int AS most,
               CASE WHEN r.rolsuper THEN 0 ELSE current_setting('superuser_reserved_connections')::int
                    + COALESCE(current_setting('reserved_connections', true)::int, 0) END AS reserved,
               NULLIF(r.rolconnlimit, -1) AS of_role, NULLIF(d.datconnlimit, -1) AS of_database,
               (SELECT count(*) FROM pg_stat_activity
                 WHERE backend_type = 'client backend' AND application_name NOT LIKE 'loom:%'
                   AND pid <> pg_backend_pid()) AS others,
               to_regclass('instances') IS NOT NULL AS has_instances
          FROM pg_roles r, pg_database d WHERE r.rolname = current_user AND d.datname = current_database()
        """
    )
    if row["pid"] != look.connection.raw.info.backend_pid:
        return unchecked("a pooler stands between: compare its max_client_conn and default_pool_size with the pools")
    count = look.row("SELECT count(*) AS it FROM instances WHERE status <> 'dead'")["it"] if row["has_instances"] else 0
    count = max(count, look.config.server.workers)
    pool = min(look.config.database.pool_max, look.config.server.threads)
    needed = count * (pool + DEDICATED)
    rooms = {"max_connections": row["most"] - row["reserved"] - row["others"]}
    rooms |= {"the limit of the role": row["of_role"], "the limit of the database": row["of_database"]}
    name, room = min(((name, room) for name, room in rooms.items() if room is not None), key=lambda pair: pair[1])
    text = f"{count} instances with a pool of {pool} may open {needed} connections; {name} leaves room for {room}"
    if needed <= room:
        return ok(text)
    raise_it = {
        "max_connections": f"ALTER SYSTEM SET max_connections = {needed + row['most'] - room}, and restart PostgreSQL",
        "the limit of the role": f"ALTER ROLE CURRENT_USER CONNECTION LIMIT {needed}",
        "the limit of the database": f"ALTER DATABASE {look.connection.raw.info.dbname} CONNECTION LIMIT {needed}",
    }[name]
    return wrong(text, f'loom psql -c "{raise_it}" as a superuser; or lower pool_max_conns, or use pgBouncer')


def durability(look: Look) -> Result:
    off = look.rows(
        """
        SELECT name, source, current_database() AS database, current_user AS role FROM pg_settings
         WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes') AND setting = 'off'
        """
    )
    if not off:
        return ok("fsync, synchronous_commit and full_page_writes are on")
    return wrong(
        f"{', '.join(row['name'] for row in off)} off: a crash of the database may lose acknowledged writes",
        "; ".join(map(_switch_on, off)),
    )


def _switch_on(row: Row) -> str:
    where = {
        "database": f"ALTER DATABASE {row['database']} RESET {row['name']}",
        "user": f"ALTER ROLE {row['role']} RESET {row['name']}",
        "database user": f"ALTER ROLE {row['role']} IN DATABASE {row['database']} RESET {row['name']}",
        "client": f"remove {row['name']} from options in database.dsn",
        "command line": f"remove {row['name']} from the command line of PostgreSQL",
    }.get(row["source"])
    return where or f"ALTER SYSTEM SET {row['name']} = on; SELECT pg_reload_conf()"


def replication(look: Look) -> Result:
    standbys = look.rows(
        """
        SELECT COALESCE(NULLIF(application_name, ''), client_addr::text, pid::text) AS name, state, sync_state,
               COALESCE(extract(epoch FROM replay_lag), 0)::float AS seconds,
               pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn)::float AS bytes
          FROM pg_stat_replication WHERE state IS DISTINCT FROM 'backup'
        """
    )
    slots = look.rows(
        """
        SELECT slot_name, pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)) AS kept
          FROM pg_replication_slots WHERE NOT active
        """
    )
    synchronous = look.row("SELECT current_setting('synchronous_standby_names') AS names")["names"]
    faults = []
    if synchronous and not any(row["sync_state"] in ("sync", "quorum", None) for row in standbys):
        faults.append(
            (
                f"no standby of synchronous_standby_names = '{synchronous}' is connected: every commit waits",
                "start the standby; or ALTER SYSTEM SET synchronous_standby_names = '', SELECT pg_reload_conf()",
            )
        )
    for row in standbys:
        if row["state"] not in ("streaming", None):
            faults.append((f"standby {row['name']} is in state {row['state']}", "look into the log of the standby"))
        elif row["seconds"] > look.limits.replica_seconds or (row["bytes"] or 0) > look.limits.replica_bytes:
            late = f"{span(row['seconds'])} and {(row['bytes'] or 0) / 2**20:.0f} MB"
            faults.append((f"standby {row['name']} is {late} behind", "look at disk, CPU and network of the standby"))
    for row in slots:
        text = f"replication slot {row['slot_name']} is not used, and keeps {row['kept'] or 'no'} WAL"
        faults.append((text, f"start its standby, or SELECT pg_drop_replication_slot('{row['slot_name']}')"))
    if faults:
        return wrong("; ".join(text for text, _ in faults), "; ".join(remedy for _, remedy in faults))
    if any(row["state"] is None for row in standbys):
        return unchecked(NO_RIGHT.format(role=look.connection and look.connection.raw.info.user))
    if not standbys:
        return ok("no standby is connected")
    return ok(
        ", ".join(f"{row['name']} {row['sync_state']}, {(row['bytes'] or 0):.0f} bytes behind" for row in standbys)
    )


def snapshots(look: Look) -> Result:
    """What keeps vacuum from cleaning up."""
    found = look.rows(
        """
        SELECT format('session %%s (%%s)', pid, concat_ws(', ', NULLIF(application_name, ''), state)) AS who,
               extract(epoch FROM clock_timestamp() - xact_start)::float AS age,
               format('SELECT pg_terminate_backend(%%s)', pid) AS remedy
          FROM pg_stat_activity
         WHERE datname = current_database() AND backend_type NOT LIKE 'autovacuum%%'
           AND xact_start < clock_timestamp() - make_interval(secs => %(limit)s)
        UNION ALL
        SELECT format('prepared transaction %%s', gid), extract(epoch FROM clock_timestamp() - prepared)::float,
               format('ROLLBACK PREPARED %%L', gid)
          FROM pg_prepared_xacts
         WHERE database = current_database() AND prepared < clock_timestamp() - make_interval(secs => %(limit)s)
         ORDER BY age DESC LIMIT 3
        """,
        limit=look.limits.transaction_seconds,
    )
    if found:
        return wrong(
            f"{'; '.join(f'''{row['who']} has kept a transaction open for {span(row['age'])}''' for row in found)}:"
            " no vacuum removes rows that are newer, and claims become slow",
            f'loom psql -c "{found[0]["remedy"]}"',
        )
    if look.row("SELECT pg_has_role('pg_read_all_stats', 'USAGE') AS it")["it"]:
        return ok(f"no transaction has been open for {span(look.limits.transaction_seconds)}")
    return ok(
        f"no transaction of this role has been open for {span(look.limits.transaction_seconds)};"
        f" {NO_RIGHT.format(role=look.connection and look.connection.raw.info.user)}"
    )


def row_locks(look: Look) -> Result:
    """Sessions that have waited for a lock of PostgreSQL, and who keeps it."""
    found = look.rows(
        """
        SELECT pid, (pg_blocking_pids(pid))[1] AS by, extract(epoch FROM clock_timestamp() - query_start)::float AS age
          FROM pg_stat_activity
         WHERE datname = current_database() AND wait_event_type = 'Lock'
           AND query_start < clock_timestamp() - make_interval(secs => %(limit)s)
         ORDER BY age DESC
        """,
        limit=look.limits.row_lock_seconds,
    )
    if not found:
        return ok(f"no session has waited for {span(look.limits.row_lock_seconds)}")
    first = found[0]
    return wrong(
        f"{len(found)} sessions wait for locks, {first['pid']} for {span(first['age'])}: session {first['by']} has it",
        f'loom psql -c "SELECT pg_terminate_backend({first["by"]})"',
    )
