"""Loom's own tables: rights, schema, vacuum, instances, what should have been cleaned up, locks."""

from __future__ import annotations

import re

from loom import instances
from loom.db import schema
from loom.doctor.look import Look, Result, ok, wrong
from loom.overview import span

TABLES = re.findall(r"^CREATE (?:UNLOGGED )?TABLE IF NOT EXISTS (\w+)", schema.TEXT, re.MULTILINE)
SEQUENCES = re.findall(r"^CREATE SEQUENCE IF NOT EXISTS (\w+)", schema.TEXT, re.MULTILINE)


def schema_version(look: Look) -> Result:
    with look.reading() as conn:
        found = schema.applied(conn)
        (role,) = conn.execute(
            """
            SELECT format('GRANT USAGE, CREATE ON SCHEMA %I TO %I', s, current_user) AS remedy,
                   has_schema_privilege(s, 'CREATE') AS may_create, current_database() AS database
              FROM COALESCE(current_schema, 'public') AS s
            """
        )
    grant = "" if role["may_create"] else f'as a superuser: psql {role["database"]} -c "{role["remedy"]}"; then '
    if found is None:
        return wrong("the database has no schema of Loom", f"{grant}loom migrate")
    if found[0] > schema.VERSION:
        return wrong(
            f"the database has schema version {found[0]}, this Loom knows {schema.VERSION}", "upgrade this Loom"
        )
    if found[0] < schema.VERSION:
        return wrong(f"the database has schema version {found[0]}, this Loom needs {schema.VERSION}", "loom migrate")
    if found[1] != schema.CHECKSUM:
        return wrong(f"schema version {found[0]}, but of another build or applied by hand", "loom migrate")
    return ok(f"version {found[0]}")


def rights(look: Look) -> Result:
    found = look.rows(
        """
        SELECT name, current_user AS role, current_schema AS schema, current_database() AS database
          FROM unnest(%(tables)s::text[] || %(sequences)s::text[]) AS name
          JOIN pg_class c ON c.oid = to_regclass(name)
         WHERE NOT CASE c.relkind
                        WHEN 'S' THEN has_sequence_privilege(c.oid, 'USAGE')
                        ELSE has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT')
                             AND has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE') END
        """,
        tables=TABLES,
        sequences=SEQUENCES,
    )
    if not found:
        return ok("the role may read and write all tables of Loom")
    role, name, database = found[0]["role"], found[0]["schema"], found[0]["database"]
    grants = (
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {name} TO {role}",
        f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA {name} TO {role}",
    )
    return wrong(
        f"role {role} may not read and write {len(found)} tables and sequences, {found[0]['name']} among them",
        f'as a superuser: psql {database} -c "{"; ".join(grants)}"',
    )


def vacuum(look: Look) -> Result:
    """Dead rows that autovacuum should have removed, and tables that are much larger than their rows."""
    found = look.rows(
        """
        SELECT relname AS name, n_dead_tup AS dead, pg_relation_size(relid) AS size,
               n_dead_tup > GREATEST(%(dead)s, %(times)s * (threshold + scale * n_live_tup)) AS late, disabled
          FROM pg_stat_user_tables s, LATERAL (
            SELECT COALESCE(max(option_value) FILTER (WHERE option_name = 'autovacuum_vacuum_threshold'),
                            current_setting('autovacuum_vacuum_threshold'))::float AS threshold,
                   COALESCE(max(option_value) FILTER (WHERE option_name = 'autovacuum_vacuum_scale_factor'),
                            current_setting('autovacuum_vacuum_scale_factor'))::float AS scale,
                   NOT COALESCE(max(option_value) FILTER (WHERE option_name = 'autovacuum_enabled'), 'on')::boolean
                   OR NOT current_setting('autovacuum')::boolean OR NOT current_setting('track_counts')::boolean
                   AS disabled
              FROM pg_class c LEFT JOIN pg_options_to_table(c.reloptions) ON true WHERE c.oid = s.relid) AS options
         WHERE relid = ANY (SELECT to_regclass(name) FROM unnest(%(tables)s) AS name)
           AND (disabled OR n_dead_tup > GREATEST(%(dead)s, %(times)s * (threshold + scale * n_live_tup))
                OR pg_relation_size(relid) > %(empty)s + 4096.0 * n_live_tup)
         ORDER BY n_dead_tup DESC
        """,
        tables=TABLES,
        dead=look.limits.dead_rows,
        times=look.limits.vacuums_missed,
        empty=look.limits.empty_bytes,
    )
    if not found:
        return ok("dead rows are removed in time")
    names = ", ".join(row["name"] for row in found)
    if any(row["disabled"] for row in found):
        return wrong(
            f"autovacuum is switched off for {names}: claims and locks become slower and slower",
            "ALTER SYSTEM SET autovacuum = on; SELECT pg_reload_conf();"
            f" ALTER TABLE {found[0]['name']} RESET (autovacuum_enabled)",
        )
    late = [row for row in found if row["late"]]
    if late:
        return wrong(
            "; ".join(f"{row['name']} has {row['dead']:,} dead rows" for row in late),
            f'loom psql -c "VACUUM (ANALYZE) {late[0]["name"]}", after what `snapshots` names has ended',
        )
    return wrong(
        "; ".join(f"{row['name']} takes {row['size'] / 2**20:.0f} MB, most of it empty" for row in found),
        f'loom psql -c "VACUUM FULL {found[0]["name"]}", which locks the table for seconds',
    )


def registry(look: Look) -> Result:
    with look.reading() as conn:
        rows = instances.registry(conn)
        active = instances.active(conn)
    dead = [row for row in rows if row.status == "dead"]
    if dead:
        who = "; ".join(
            f"{row.hostname}:{row.metadata.get('port', '?')} has been silent for {span(row.heartbeat_age_seconds)}"
            for row in dead
        )
        port = dead[0].metadata.get("port", "PORT")
        return wrong(who, f"on {dead[0].hostname}: systemctl status loom@{port}; journalctl -u loom@{port} -n 50")
    if not active:
        return wrong("no instance is active", "systemctl start loom.target, or loom serve")
    versions = sorted({str(row.metadata.get("version")) for row in rows})
    return ok(f"{active} active, of version {' and '.join(versions)}")


def clean_up(look: Look) -> Result:
    row = look.row(
        """
        SELECT (SELECT count(*) FROM distributed_locks WHERE expires_at < t) AS "expired locks",
               (SELECT count(*) FROM beads
                 WHERE status = 'in_progress' AND wakes_at(not_before, lease_expires_at) < t) AS "lapsed claims",
               (SELECT count(*) FROM (SELECT FROM events e
                 WHERE e.place >= (SELECT first FROM event_gaps ORDER BY last DESC LIMIT 1) AND e.timestamp < t
                 LIMIT 1000) AS late) AS "events without a place in the feed"
          FROM (SELECT clock_timestamp() - make_interval(secs => %(overdue)s) AS t) AS due
        """,
        overdue=look.limits.overdue_seconds,
    )
    late = [f"{number} {name}" for name, number in row.items() if number]
    if not late:
        return ok("nothing is overdue")
    return wrong(
        f"{', '.join(late)} should have been cleaned up {span(look.limits.overdue_seconds)} ago",
        "journalctl -u 'loom@*' | grep -e upkeep-failed -e upkeep-skipped; if no instance is active, start one",
    )


def locks(look: Look) -> Result:
    found = look.rows(
        """
        SELECT lock_name, owner, fencing_token, waiting,
               extract(epoch FROM clock_timestamp() - acquired_at)::float AS age
          FROM distributed_locks l LEFT JOIN LATERAL (
               SELECT count(*) AS waiting FROM lock_waiters w
                WHERE w.lock_name = l.lock_name AND keeps_place(asked_at, clock_timestamp())) AS w ON true
         WHERE expires_at > clock_timestamp() AND owner NOT LIKE 'instance:%%' AND (
               acquired_at < clock_timestamp() - make_interval(secs => %(long)s) OR waiting >= %(waiters)s
               OR waiting > 0 AND acquired_at < clock_timestamp() - make_interval(secs => %(contended)s))
         ORDER BY waiting DESC, acquired_at LIMIT 3
        """,
        long=look.limits.lock_seconds,
        waiters=look.limits.waiters,
        contended=look.limits.contended_seconds,
    )
    if not found:
        return ok("none is held for long while others wait")
    first = found[0]
    return wrong(
        "; ".join(
            f"{row['owner']} has held {row['lock_name']} for {span(row['age'])}, and {row['waiting']} wait for it"
            for row in found
        ),
        "ask its owner, or end the grant: loom psql -c"
        f' "DELETE FROM distributed_locks WHERE fencing_token = {first["fencing_token"]}"',
    )


def split_brain(look: Look) -> Result:
    with look.reading() as conn:
        # Not through an index: only one that is corrupt would let two rows be.
        conn.execute("SET LOCAL enable_indexscan = off; SET LOCAL enable_indexonlyscan = off")
        found = conn.execute("SELECT lock_name FROM distributed_locks GROUP BY lock_name HAVING count(*) > 1 LIMIT 3")
    if not found:
        return ok("no lock has two rows")
    return wrong(
        f"{', '.join(row['lock_name'] for row in found)}: two rows for one lock, so an index is corrupt",
        "stop all instances, restore a backup, and then: SELECT raise_fencing_tokens()",
    )
