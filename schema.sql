-- Loom's whole database, in the order in which a reader meets it. Schema version 1.
--
-- Applied by `loom migrate` and by every instance at its start (under one advisory lock, and only when it changed),
-- or by hand: psql -1 -f schema.sql. Safe to run again. PostgreSQL 12 to 18, READ COMMITTED.
--
-- Names and ids are COLLATE "C": an upgrade of the C library changes the order of other collations, which corrupts
-- their unique indexes, and then a lock has two holders.


-- Schema version ------------------------------------------------------------------------------------------------

-- One row. An instance that finds a larger version than its own refuses to start. `checksum` is of this file.
CREATE TABLE IF NOT EXISTS schema_version (
    only_row   boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    version    integer     NOT NULL,
    checksum   text,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO schema_version (version) VALUES (1)
    ON CONFLICT (only_row) DO UPDATE SET version = excluded.version, checksum = NULL, applied_at = clock_timestamp();


-- Cluster ---------------------------------------------------------------------------------------------------------

-- One row of what the cluster as a whole remembers.
CREATE TABLE IF NOT EXISTS cluster (
    only_row         boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    -- the last time that the database came back to the instances; see note_outage()
    outage_ended_at  timestamptz NOT NULL DEFAULT '-infinity',
    -- which history of this database the fencing tokens belong to, and the least one of it; see next_fencing_token()
    fencing_identity text        COLLATE "C",
    fencing_base     bigint      NOT NULL DEFAULT 0
);
INSERT INTO cluster DEFAULT VALUES ON CONFLICT DO NOTHING;


-- Instances -------------------------------------------------------------------------------------------------------

-- One row per running worker. Written by its own heartbeat, by its gunicorn master when it dies, and by upkeep.
-- A row that is removed, also by hand, sends its worker back for a new identity.
CREATE TABLE IF NOT EXISTS instances (
    instance_id    uuid        PRIMARY KEY,
    hostname       text        NOT NULL,
    started_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_heartbeat timestamptz NOT NULL DEFAULT clock_timestamp(),
    status         text        NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'draining', 'dead')),
    metadata       jsonb       NOT NULL DEFAULT '{}'
) WITH (fillfactor = 50);

-- When everybody has been silent for three heartbeats, it is the database that was away, not they.
CREATE OR REPLACE FUNCTION note_outage() RETURNS void LANGUAGE sql AS $$
    UPDATE cluster SET outage_ended_at = clock_timestamp()
     WHERE (SELECT max(last_heartbeat) FROM instances WHERE status <> 'dead') < clock_timestamp() - INTERVAL '15 seconds';
$$;

CREATE OR REPLACE FUNCTION register_instance(id uuid, host text, about jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM note_outage();
    INSERT INTO instances (instance_id, hostname, metadata) VALUES (id, host, about);
END $$;

-- False: removed or declared dead. The caller takes a new identity; nothing brings a row back to life.
CREATE OR REPLACE FUNCTION heartbeat_instance(id uuid, new_status text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM note_outage();
    UPDATE instances SET last_heartbeat = clock_timestamp(), status = new_status
     WHERE instance_id = id AND status <> 'dead';
    RETURN FOUND;
END $$;

-- Whether a missed heartbeat means anything: not in the first minute after the database came back.
CREATE OR REPLACE FUNCTION heartbeats_count() RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT GREATEST(pg_postmaster_start_time(), (SELECT outage_ended_at FROM cluster))
           < clock_timestamp() - INTERVAL '60 seconds';
$$;

CREATE OR REPLACE FUNCTION instance_status(status text, last_heartbeat timestamptz) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN last_heartbeat < clock_timestamp() - INTERVAL '60 seconds' AND heartbeats_count()
                THEN 'dead' ELSE status END;
$$;


-- Locks -----------------------------------------------------------------------------------------------------------

-- Every grant draws a larger number than all before it. Stand-alone on purpose: TRUNCATE ... RESTART IDENTITY resets a
-- sequence that a column owns. Below 2^53, so that every JSON reader keeps it exact. CACHE 1: a cached block would be
-- handed out late.
CREATE SEQUENCE IF NOT EXISTS fencing_tokens MAXVALUE 9007199254740991 CACHE 1;

-- One row per held lock. The primary key is the promise: two holders of one lock cannot exist. A row past expires_at is
-- free to take. A grant ends when its row is deleted, by whomever; the triggers below then write its history.
CREATE TABLE IF NOT EXISTS distributed_locks (
    lock_name     text        COLLATE "C" PRIMARY KEY CHECK (char_length(lock_name) BETWEEN 1 AND 255),
    instance_id   uuid,
    owner         text        COLLATE "C" NOT NULL,
    fencing_token bigint      NOT NULL,
    acquired_at   timestamptz NOT NULL,
    expires_at    timestamptz NOT NULL,
    heartbeat_at  timestamptz NOT NULL,
    metadata      jsonb       NOT NULL DEFAULT '{}'
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
        autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 10000);
CREATE INDEX IF NOT EXISTS distributed_locks_owner ON distributed_locks (owner);

-- The history: one row per grant that has ended. Written by the triggers alone; kept for locks.history_days.
CREATE TABLE IF NOT EXISTS grants (
    lock_name     text        COLLATE "C" NOT NULL,
    instance_id   uuid,
    owner         text        COLLATE "C" NOT NULL,
    fencing_token bigint      PRIMARY KEY,
    acquired_at   timestamptz NOT NULL,
    expires_at    timestamptz NOT NULL,
    heartbeat_at  timestamptz NOT NULL,
    metadata      jsonb       NOT NULL,
    ended_at      timestamptz NOT NULL,
    ended_how     text        NOT NULL CHECK (ended_how IN ('released', 'expired', 'forced', 'owner-died')),
    reason        text
);
CREATE INDEX IF NOT EXISTS grants_lock_name ON grants (lock_name, fencing_token);
CREATE INDEX IF NOT EXISTS grants_owner ON grants (owner, fencing_token);

-- How a grant ended. Who ends one on purpose, and in time, says so in two settings of its transaction; a row deleted or
-- truncated by hand says nothing, and a grant that had expired has expired, whoever cleans it up.
CREATE OR REPLACE FUNCTION end_grant(g distributed_locks) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp();
BEGIN
    INSERT INTO grants VALUES (
        g.lock_name, g.instance_id, g.owner, g.fencing_token, g.acquired_at, g.expires_at, g.heartbeat_at, g.metadata,
        LEAST(t, g.expires_at),
        COALESCE(NULLIF(current_setting('loom.ended_how', true), ''),
                 CASE WHEN g.expires_at <= t THEN 'expired' ELSE 'forced' END),
        NULLIF(current_setting('loom.reason', true), ''));
END $$;

CREATE OR REPLACE FUNCTION on_lock_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM end_grant(OLD);
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS lock_deleted ON distributed_locks;
CREATE TRIGGER lock_deleted AFTER DELETE ON distributed_locks FOR EACH ROW EXECUTE FUNCTION on_lock_deleted();

CREATE OR REPLACE FUNCTION on_locks_truncated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM end_grant(l) FROM distributed_locks l;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS locks_truncated ON distributed_locks;
CREATE TRIGGER locks_truncated BEFORE TRUNCATE ON distributed_locks FOR EACH STATEMENT EXECUTE FUNCTION on_locks_truncated();

-- Who waits for a lock, first come, first served. A place lasts 2 s after its last ask. UNLOGGED: a waiter whose place
-- is lost in a crash asks again.
CREATE UNLOGGED TABLE IF NOT EXISTS lock_waiters (
    lock_name text        COLLATE "C" NOT NULL,
    owner     text        COLLATE "C" NOT NULL,
    place     bigint      GENERATED BY DEFAULT AS IDENTITY,
    asked_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (lock_name, owner)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
CREATE INDEX IF NOT EXISTS lock_waiters_place ON lock_waiters (lock_name, place);

-- Lifts the tokens above every one ever given: 2^32 beyond the greatest that this database remembers, and beyond what
-- another copy of the same past, which did the same before, can have given since: 2^21 for every second of the clock
-- (until the year 2096, which also bounds what a wrong clock does). Run it by hand after bringing back an old copy of
-- the server's files, which nothing inside can notice.
CREATE OR REPLACE FUNCTION raise_fencing_tokens() RETURNS bigint LANGUAGE sql AS $$
    UPDATE cluster SET fencing_base = GREATEST(
        (LEAST(extract(epoch FROM clock_timestamp()), 4e9) * 2097152)::bigint,
        4294967296 + GREATEST(
               fencing_base,
               (SELECT last_value FROM fencing_tokens),
               (SELECT max(fencing_token) FROM grants),
               (SELECT max(fencing_token) FROM distributed_locks)));
    SELECT setval('fencing_tokens', fencing_base) FROM cluster;
$$;

-- Which history of which database the sequence belongs to. A restore, a point-in-time recovery, an asynchronous failover
-- and a logical upgrade set it back; each gives the database another system identifier, another timeline or the sequence
-- another file.
CREATE OR REPLACE FUNCTION fencing_identity_now() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    RETURN (SELECT system_identifier FROM pg_control_system())
           || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8)
           || '/' || pg_relation_filepath('fencing_tokens');
END $$;
-- From the beginning, so that a copy made before the first grant is told from the original, too.
UPDATE cluster SET fencing_identity = fencing_identity_now() WHERE fencing_identity IS NULL;

-- Draws the token of a new grant; the caller holds the lock's name, so that an older number cannot be granted after a
-- newer one. Another history than the one before is noticed here, before the first grant in it.
CREATE OR REPLACE FUNCTION next_fencing_token() RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    identity text := fencing_identity_now();
BEGIN
    IF (SELECT fencing_identity FROM cluster) IS DISTINCT FROM identity THEN
        -- Of several that notice at once, one passes the WHERE; the others wait for it here.
        INSERT INTO cluster AS c (fencing_identity) VALUES (identity)
            ON CONFLICT (only_row) DO UPDATE SET fencing_identity = identity
                WHERE c.fencing_identity IS DISTINCT FROM identity;
        IF FOUND THEN
            PERFORM raise_fencing_tokens();
        END IF;
    END IF;
    RETURN nextval('fencing_tokens');
END $$;

-- Takes the lock if it is free and promised to nobody before us. The order is the promise: name, row, only then the
-- clock. outcome: 'new' a new grant, 'same' ours of before, 'held' by another (then that grant), 'promised' to a waiter.
CREATE OR REPLACE FUNCTION acquire_lock(name text, new_owner text, instance uuid, ttl interval, about jsonb, wait boolean)
RETURNS TABLE (outcome text, waiting bigint, lock_name text, instance_id uuid, owner text, fencing_token bigint,
               acquired_at timestamptz, expires_at timestamptz, heartbeat_at timestamptz, metadata jsonb)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    held distributed_locks;
    first text;
    t timestamptz;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(name, 0));
    -- Nobody waits for the transactions that a row fences only to hear that it is held.
    SELECT * INTO held FROM distributed_locks l WHERE l.lock_name = name FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        SELECT * INTO held FROM distributed_locks l WHERE l.lock_name = name;
    END IF;
    t := clock_timestamp();
    IF held.owner = new_owner OR held.expires_at <= t THEN
        SELECT * INTO held FROM distributed_locks l WHERE l.lock_name = name FOR UPDATE;
        t := clock_timestamp();
    END IF;

    IF held.expires_at > t AND held.owner = new_owner THEN
        RETURN QUERY
            UPDATE distributed_locks AS l
               SET expires_at = GREATEST(l.expires_at, t + ttl), heartbeat_at = t, metadata = COALESCE(about, l.metadata)
             WHERE l.lock_name = name
            RETURNING 'same', 0::bigint, l.*;
        RETURN;
    END IF;

    IF held.expires_at > t THEN
        outcome := 'held';
    ELSE
        SELECT w.owner INTO first FROM lock_waiters w
         WHERE w.lock_name = name AND w.asked_at > t - INTERVAL '2 seconds' ORDER BY w.place LIMIT 1;
        IF first <> new_owner THEN
            outcome := 'promised';
            held := NULL;
        ELSE
            IF held.lock_name IS NOT NULL THEN
                DELETE FROM distributed_locks l WHERE l.lock_name = name;
            END IF;
            IF first IS NOT NULL THEN
                DELETE FROM lock_waiters w WHERE w.lock_name = name AND w.owner = new_owner;
            END IF;
            RETURN QUERY
                INSERT INTO distributed_locks AS l
                VALUES (name, instance, new_owner, next_fencing_token(), t, t + ttl, t, COALESCE(about, '{}'))
                RETURNING 'new', 0::bigint, l.*;
            RETURN;
        END IF;
    END IF;

    IF wait THEN
        -- A place that lapsed is lost: its owner stands at the end again.
        INSERT INTO lock_waiters AS w (lock_name, owner, asked_at) VALUES (name, new_owner, t)
            ON CONFLICT ON CONSTRAINT lock_waiters_pkey DO UPDATE
               SET asked_at = t,
                   place = CASE WHEN w.asked_at > t - INTERVAL '2 seconds' THEN w.place ELSE excluded.place END;
    END IF;
    SELECT count(*) INTO waiting FROM lock_waiters w WHERE w.lock_name = name AND w.asked_at > t - INTERVAL '2 seconds';
    RETURN QUERY SELECT outcome, waiting, held.*;
END $$;

-- One poll for all who wait in one worker: keeps their places and grants what has become free to its first waiter.
-- Passes over names and rows that others are at, so that one of them cannot hold up the rest.
CREATE OR REPLACE FUNCTION poll_waiters(names text[], owners text[], ttls interval[], abouts jsonb[], instance uuid)
RETURNS TABLE (outcome text, waiting bigint, lock_name text, instance_id uuid, owner text, fencing_token bigint,
               acquired_at timestamptz, expires_at timestamptz, heartbeat_at timestamptz, metadata jsonb)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    t timestamptz := clock_timestamp();
    next record;
BEGIN
    INSERT INTO lock_waiters AS w (lock_name, owner, asked_at)
        SELECT m.name, m.owner, t FROM unnest(names, owners) AS m (name, owner)
         WHERE NOT EXISTS (SELECT 1 FROM lock_waiters x WHERE x.lock_name = m.name AND x.owner = m.owner
                              AND x.asked_at > t - INTERVAL '0.5 seconds')
         ORDER BY m.name, m.owner
        ON CONFLICT ON CONSTRAINT lock_waiters_pkey DO UPDATE
           SET asked_at = t,
               place = CASE WHEN w.asked_at > t - INTERVAL '2 seconds' THEN w.place ELSE excluded.place END;

    FOR next IN
        SELECT m.* FROM (SELECT DISTINCT n.name FROM unnest(names) AS n (name)) AS wanted
          CROSS JOIN LATERAL (SELECT w.owner FROM lock_waiters w
                               WHERE w.lock_name = wanted.name AND w.asked_at > t - INTERVAL '2 seconds'
                               ORDER BY w.place LIMIT 1) AS first
          JOIN unnest(names, owners, ttls, abouts) AS m (name, owner, ttl, about)
            ON m.name = wanted.name AND m.owner = first.owner
         WHERE NOT EXISTS (SELECT 1 FROM distributed_locks l WHERE l.lock_name = wanted.name AND l.expires_at > t)
         ORDER BY m.name
    LOOP
        IF NOT pg_try_advisory_xact_lock(hashtextextended(next.name, 0)) THEN
            -- Many may ask for this name without waiting: stand in line with them for a moment, or its waiters starve.
            BEGIN
                PERFORM set_config('lock_timeout', '20ms', true);
                PERFORM pg_advisory_xact_lock(hashtextextended(next.name, 0));
                PERFORM set_config('lock_timeout', '0', true);
            EXCEPTION WHEN lock_not_available THEN
                CONTINUE;
            END;
        END IF;
        PERFORM 1 FROM distributed_locks l WHERE l.lock_name = next.name FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND AND EXISTS (SELECT 1 FROM distributed_locks l WHERE l.lock_name = next.name);
        RETURN QUERY SELECT * FROM acquire_lock(next.name, next.owner, instance, next.ttl, next.about, false) a
                      WHERE a.outcome IN ('new', 'same');
    END LOOP;
END $$;

-- Never inserts, never revives. The order is the promise: name, row, only then the clock (an UPDATE that waits for the
-- row after reading the clock revives a lock that ended meanwhile).
CREATE OR REPLACE FUNCTION renew_lock(name text, token bigint, ttl interval) RETURNS SETOF distributed_locks
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(name, 0));
    PERFORM 1 FROM distributed_locks WHERE lock_name = name FOR NO KEY UPDATE;
    RETURN QUERY
        UPDATE distributed_locks SET expires_at = clock_timestamp() + ttl, heartbeat_at = clock_timestamp()
         WHERE lock_name = name AND fencing_token = token AND expires_at > clock_timestamp()
        RETURNING *;
END $$;

-- Ends one grant, if it still is one. how: 'released' by its holder, 'forced' by an operator who says why.
CREATE OR REPLACE FUNCTION release_lock(name text, token bigint, how text, why text) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    done boolean;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(name, 0));
    PERFORM 1 FROM distributed_locks WHERE lock_name = name FOR UPDATE;
    PERFORM set_config('loom.ended_how', how, true), set_config('loom.reason', COALESCE(why, ''), true);
    DELETE FROM distributed_locks
     WHERE lock_name = name AND fencing_token = token AND expires_at > clock_timestamp();
    done := FOUND;
    PERFORM set_config('loom.ended_how', '', true), set_config('loom.reason', '', true);
    RETURN done;
END $$;

-- Takes back a grant of which its owner was not told; not if it has asked again since, and was told then.
CREATE OR REPLACE FUNCTION take_back_lock(name text, token bigint, untouched timestamptz) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(name, 0));
    PERFORM 1 FROM distributed_locks WHERE lock_name = name AND fencing_token = token AND heartbeat_at = untouched
        FOR UPDATE;
    IF FOUND THEN
        PERFORM release_lock(name, token, 'released', NULL);
    END IF;
END $$;

-- Fences a write: call it in the write's own transaction. Raises L0001 (lock-lost) unless the grant is held now, and
-- keeps its row locked until commit, so that no later grant can be made, nor its holder write, before this commits.
CREATE OR REPLACE FUNCTION loom_fence(name text, token bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    ends timestamptz;
BEGIN
    IF current_setting('transaction_isolation') = 'read committed' THEN
        -- Whoever takes the lock or deletes its row waits for this; its holder's renewals do not.
        SELECT expires_at INTO ends FROM distributed_locks WHERE lock_name = name AND fencing_token = token FOR KEY SHARE;
    ELSE
        -- An older snapshot must not hide a changed end: 40001 after a renewal, and the caller tries again.
        SELECT expires_at INTO ends FROM distributed_locks WHERE lock_name = name AND fencing_token = token FOR SHARE;
    END IF;
    IF ends IS NULL OR ends <= clock_timestamp() THEN
        RAISE EXCEPTION 'lock % is not held with fencing token %', name, token USING ERRCODE = 'L0001';
    END IF;
END $$;

-- What an instance holds for itself ends with it.
CREATE OR REPLACE FUNCTION end_grants_of_instance(id uuid, how text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('loom.ended_how', how, true);
    DELETE FROM distributed_locks WHERE owner = 'instance:' || id AND expires_at > clock_timestamp();
    PERFORM set_config('loom.ended_how', '', true);
END $$;

CREATE OR REPLACE FUNCTION on_instance_ended() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM end_grants_of_instance(OLD.instance_id, 'owner-died');
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS instance_deleted ON instances;
CREATE TRIGGER instance_deleted AFTER DELETE ON instances FOR EACH ROW EXECUTE FUNCTION on_instance_ended();
DROP TRIGGER IF EXISTS instance_died ON instances;
CREATE TRIGGER instance_died AFTER UPDATE OF status ON instances FOR EACH ROW
    WHEN (NEW.status = 'dead' AND OLD.status <> 'dead') EXECUTE FUNCTION on_instance_ended();

CREATE OR REPLACE FUNCTION leave_instance(id uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    -- Its row first, as the trigger of one that is declared dead has it: two orders would deadlock.
    PERFORM 1 FROM instances WHERE instance_id = id FOR UPDATE;
    PERFORM end_grants_of_instance(id, 'released');
    DELETE FROM instances WHERE instance_id = id;
END $$;
