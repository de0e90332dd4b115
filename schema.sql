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
    fencing_base     bigint      NOT NULL DEFAULT 0,
    -- the greatest id of an event that was removed, by retention or by hand
    events_forgotten bigint      NOT NULL DEFAULT 0
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
-- proxy_request_id: of the request that ended it, see acting_as().
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
    reason        text,
    proxy_request_id text     COLLATE "C" DEFAULT NULLIF(current_setting('loom.proxy_request_id', true), '')
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

-- A grant ends when its row is deleted, or when the next grant takes the row over.
CREATE OR REPLACE FUNCTION on_grant_ended() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM end_grant(OLD);
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS grant_ended ON distributed_locks;
CREATE TRIGGER grant_ended AFTER DELETE OR UPDATE OF fencing_token ON distributed_locks FOR EACH ROW
    EXECUTE FUNCTION on_grant_ended();

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

-- How long a place lasts after its last ask: longer than the pause between two polls of a worker, or between two requests
-- of a client that is sent away; short, since a waiter that has died holds up the others for so long.
CREATE OR REPLACE FUNCTION keeps_place(asked_at timestamptz, t timestamptz) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT asked_at > t - INTERVAL '2 seconds';
$$;

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
-- IMMUTABLE: it changes only while the server is down, and no plan that holds it survives that. Read each time, from a file, it
-- was 3 % of a claim.
CREATE OR REPLACE FUNCTION system_identifier() RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT system_identifier FROM pg_control_system()';
CREATE OR REPLACE FUNCTION fencing_identity_now() RETURNS text LANGUAGE sql AS $$
    SELECT system_identifier() || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8) || '/' || pg_relation_filepath('fencing_tokens');
$$;
-- From the beginning, so that a copy made before the first grant is told from the original, too.
UPDATE cluster SET fencing_identity = fencing_identity_now() WHERE fencing_identity IS NULL;

-- Lifts the tokens when this is another history than the one before, and so before the first grant in it.
CREATE OR REPLACE FUNCTION compare_fencing_identity() RETURNS void LANGUAGE plpgsql AS $$
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
END $$;

-- Draws the token of a new grant; the caller holds the lock's name, so that an older number cannot be granted after a
-- newer one.
CREATE OR REPLACE FUNCTION next_fencing_token() RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    PERFORM compare_fencing_identity();
    RETURN nextval('fencing_tokens');
END $$;

-- Takes the lock if it is free and no waiter comes before us. The order is the promise: name, row, only then the clock.
-- outcome: 'new' grant; 'same': the grant that this owner already holds, extended; 'held' by another, whose grant is
-- answered; 'promised' to a waiter. A refused caller writes nothing to the row, and waits for nobody.
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
    SELECT * INTO held FROM distributed_locks l WHERE l.lock_name = name;
    IF held.owner = new_owner THEN
        -- NO KEY UPDATE, as in a renewal: it does not wait for the transactions that this grant fences.
        SELECT * INTO held FROM distributed_locks l WHERE l.lock_name = name FOR NO KEY UPDATE;
    END IF;
    t := clock_timestamp();

    IF held.owner = new_owner AND held.expires_at > t THEN
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
         WHERE w.lock_name = name AND keeps_place(w.asked_at, t) ORDER BY w.place LIMIT 1;
        -- An expired row is taken FOR UPDATE: the upsert's own row lock would not conflict with the KEY SHARE of
        -- loom_fence(). While a transaction that the grant fences is running, the lock is still held.
        IF first <> new_owner THEN
            outcome := 'promised';
            held := NULL;
        ELSIF held.lock_name IS NOT NULL AND NOT EXISTS (
            SELECT 1 FROM distributed_locks l WHERE l.lock_name = name FOR UPDATE SKIP LOCKED) THEN
            outcome := 'held';
        ELSE
            IF first IS NOT NULL THEN
                DELETE FROM lock_waiters w WHERE w.lock_name = name AND w.owner = new_owner;
            END IF;
            t := clock_timestamp();
            RETURN QUERY
                INSERT INTO distributed_locks AS l
                VALUES (name, instance, new_owner, next_fencing_token(), t, t + ttl, t, COALESCE(about, '{}'))
                    ON CONFLICT ON CONSTRAINT distributed_locks_pkey DO UPDATE
                   SET (instance_id, owner, fencing_token, acquired_at, expires_at, heartbeat_at, metadata)
                     = (excluded.instance_id, excluded.owner, excluded.fencing_token, excluded.acquired_at,
                        excluded.expires_at, excluded.heartbeat_at, excluded.metadata)
                 WHERE l.expires_at <= excluded.acquired_at
                RETURNING 'new', 0::bigint, l.*;
            RETURN;
        END IF;
    END IF;

    IF wait THEN
        -- A place that lapsed is lost: its owner stands at the end again.
        INSERT INTO lock_waiters AS w (lock_name, owner, asked_at) VALUES (name, new_owner, t)
            ON CONFLICT ON CONSTRAINT lock_waiters_pkey DO UPDATE
               SET asked_at = t,
                   place = CASE WHEN keeps_place(w.asked_at, t) THEN w.place ELSE excluded.place END;
    END IF;
    SELECT count(*) INTO waiting FROM lock_waiters w WHERE w.lock_name = name AND keeps_place(w.asked_at, t);
    RETURN QUERY SELECT outcome, waiting, held.*;
END $$;

-- One poll for all requests that wait in one worker: keeps their places, and returns those that are first in line for a
-- lock that is free. It grants nothing and waits for nobody: each of them then asks by acquire_lock(). A lock that has
-- expired is not free while a transaction that it fences is still running.
CREATE OR REPLACE FUNCTION poll_waiters(names text[], owners text[]) RETURNS TABLE (lock_name text, owner text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    t timestamptz := clock_timestamp();
BEGIN
    -- A place is written at most every half second. One owner may wait in two requests.
    INSERT INTO lock_waiters AS w (lock_name, owner, asked_at)
        SELECT DISTINCT m.name, m.owner, t FROM unnest(names, owners) AS m (name, owner)
         WHERE NOT EXISTS (SELECT 1 FROM lock_waiters x WHERE x.lock_name = m.name AND x.owner = m.owner
                              AND x.asked_at > t - INTERVAL '0.5 seconds')
         ORDER BY m.name, m.owner
        ON CONFLICT ON CONSTRAINT lock_waiters_pkey DO UPDATE
           SET asked_at = t,
               place = CASE WHEN keeps_place(w.asked_at, t) THEN w.place ELSE excluded.place END;

    RETURN QUERY
        WITH wanted AS MATERIALIZED (
            SELECT DISTINCT n.name COLLATE "C" AS name FROM unnest(names) AS n (name)),
        expired AS MATERIALIZED (
            SELECT l.lock_name FROM distributed_locks l
             WHERE l.lock_name IN (SELECT name FROM wanted) AND l.expires_at <= t FOR UPDATE SKIP LOCKED)
        SELECT wanted.name, first.owner FROM wanted
         CROSS JOIN LATERAL (SELECT w.owner FROM lock_waiters w
                              WHERE w.lock_name = wanted.name AND keeps_place(w.asked_at, t)
                              ORDER BY w.place LIMIT 1) AS first
         WHERE NOT EXISTS (SELECT 1 FROM distributed_locks l WHERE l.lock_name = wanted.name)
            OR EXISTS (SELECT 1 FROM expired e WHERE e.lock_name = wanted.name);
END $$;

-- Never inserts, never revives; never shortens with `extend`. The order is the promise: name, row, only then the clock (an
-- UPDATE that waits for the row after reading the clock revives a lock that ended meanwhile).
CREATE OR REPLACE FUNCTION renew_lock(name text, token bigint, ttl interval, extend boolean) RETURNS SETOF distributed_locks
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(name, 0));
    PERFORM 1 FROM distributed_locks WHERE lock_name = name FOR NO KEY UPDATE;
    RETURN QUERY
        UPDATE distributed_locks SET expires_at = GREATEST(CASE WHEN extend THEN expires_at END, clock_timestamp() + ttl),
                                     heartbeat_at = clock_timestamp()
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
        RAISE EXCEPTION 'lock % is not held with fencing token %', name, token USING ERRCODE = 'L0001', DETAIL = name;
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


-- Events ----------------------------------------------------------------------------------------------------------

-- One row per version of every entity of the shared state: the feed, and the entity's history. Written by the triggers
-- of the entities and by the functions that claim beads; bounded by retention alone. Rows never change.
CREATE TABLE IF NOT EXISTS events (
    place       bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- the order of insertion: one entity's versions stand right
    type        text        NOT NULL,
    entity_type text        NOT NULL,
    entity_id   text        COLLATE "C" NOT NULL,
    version     bigint      NOT NULL,
    project_id  text        COLLATE "C",
    -- who did it, see acting_as(); by hand in psql nobody says so: then it is the database's user
    actor       text        NOT NULL DEFAULT COALESCE(NULLIF(current_setting('loom.actor', true), ''), session_user),
    instance_id uuid        DEFAULT NULLIF(current_setting('loom.instance_id', true), '')::uuid,
    -- the client's, for correlation: it decides nothing
    request_id  text        COLLATE "C" DEFAULT NULLIF(current_setting('loom.request_id', true), ''),
    -- the proxy's, by which a write that it repeats is known; answered to nobody
    proxy_request_id text   COLLATE "C" DEFAULT NULLIF(current_setting('loom.proxy_request_id', true), ''),
    timestamp   timestamptz NOT NULL,
    changes     jsonb       NOT NULL -- the fields that changed, with their new values
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX IF NOT EXISTS events_entity ON events (entity_type, entity_id, place);

-- The feed's order, which is not that of `place`: what commits late comes late. Written by number_events() alone. (A
-- column of events, filled by an UPDATE, took three times as long and 1.7 times the WAL, and left a dead row an event.)
CREATE TABLE IF NOT EXISTS event_numbers (
    id    bigint PRIMARY KEY, -- the cursor
    place bigint NOT NULL UNIQUE
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);

-- The places that have no number: behind the last one, and before it those that could not be seen when later ones were
-- numbered, since their transaction was under way or will never commit. xid: each of these transactions has a smaller one;
-- null when not yet known.
CREATE TABLE IF NOT EXISTS event_gaps (
    first bigint NOT NULL,
    last  bigint NOT NULL,
    xid   bigint
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
INSERT INTO event_gaps SELECT 1, 9223372036854775807 WHERE NOT EXISTS (SELECT 1 FROM event_gaps);

CREATE OR REPLACE VIEW feed AS
    SELECT n.id, e.* FROM event_numbers n JOIN events e ON e.place = n.place;

-- Numbers what has been committed, in the order of insertion, at most so much at a time; returns how many. Whoever reads
-- calls it first, in a transaction that has not written; if another is at it, that will do. The order is the promise: the
-- lock, and then each statement sees what all who had the lock before have committed. One entity's later version is seen
-- only together with the earlier ones.
CREATE OR REPLACE FUNCTION number_events(most integer DEFAULT 10000) RETURNS integer LANGUAGE plpgsql SET jit = off AS $$
DECLARE
    set_back boolean;
    greatest_id bigint;
    oldest_running bigint;
    n integer;
BEGIN
    -- Ours must be greater than the xid of whoever has inserted into a gap: from a snapshot's xmax, that of a transaction
    -- that runs cannot be told.
    IF txid_current_if_assigned() IS NOT NULL OR NOT pg_try_advisory_xact_lock(hashtextextended('loom:events', 0)) THEN
        RETURN 0;
    END IF;
    set_back := (SELECT fencing_identity FROM cluster) IS DISTINCT FROM fencing_identity_now();
    IF set_back THEN
        PERFORM compare_fencing_identity(); -- lifts what must not repeat itself, ids of events included
        UPDATE event_gaps SET xid = NULL; -- of another server, perhaps
    END IF;
    SELECT GREATEST((SELECT max(id) FROM event_numbers), events_forgotten, fencing_base) INTO greatest_id FROM cluster;
    oldest_running := txid_snapshot_xmin(txid_current_snapshot());
    WITH fresh AS MATERIALIZED (
        SELECT e.place, g.first, g.last FROM event_gaps g
         CROSS JOIN LATERAL (SELECT place FROM events WHERE place BETWEEN g.first AND g.last ORDER BY place LIMIT most) AS e
         ORDER BY e.place LIMIT most),
    numbered AS (
        INSERT INTO event_numbers (id, place) SELECT greatest_id + row_number() OVER (ORDER BY place), place FROM fresh
            ON CONFLICT (place) DO NOTHING), -- rows may have been restored without event_gaps
    filled AS (
        DELETE FROM event_gaps g USING (SELECT DISTINCT first, last FROM fresh) AS f WHERE (g.first, g.last) = (f.first, f.last)),
    split AS (
        INSERT INTO event_gaps
            SELECT r.first, r.last, CASE WHEN NOT set_back THEN txid_current() END
              FROM (SELECT COALESCE(lag(place) OVER (PARTITION BY first, last ORDER BY place) + 1, first) AS first, place - 1 AS last
                      FROM fresh
                    UNION ALL SELECT max(place) + 1, last FROM fresh GROUP BY first, last) AS r
             WHERE r.first <= r.last)
    SELECT count(*) INTO n FROM fresh;
    IF n < most AND NOT set_back THEN
        UPDATE event_gaps SET xid = txid_current() WHERE xid IS NULL AND last < 9223372036854775807;
        -- Of these all transactions had ended before the numbering looked.
        DELETE FROM event_gaps WHERE xid <= oldest_running AND last < 9223372036854775807;
    END IF;
    RETURN n;
END $$;

-- What is deleted, by retention or by hand, is remembered: its ids are not given again.
CREATE OR REPLACE FUNCTION on_events_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    forgotten bigint;
BEGIN
    WITH gone AS (DELETE FROM event_numbers n USING deleted d WHERE n.place = d.place RETURNING n.id)
    SELECT max(id) INTO forgotten FROM gone;
    UPDATE cluster SET events_forgotten = forgotten WHERE events_forgotten < forgotten;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS events_deleted ON events;
CREATE TRIGGER events_deleted AFTER DELETE ON events REFERENCING OLD TABLE AS deleted
    FOR EACH STATEMENT EXECUTE FUNCTION on_events_deleted();

CREATE OR REPLACE FUNCTION on_events_truncated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE cluster SET events_forgotten = GREATEST(events_forgotten, (SELECT max(id) FROM event_numbers));
    TRUNCATE event_numbers, event_gaps;
    INSERT INTO event_gaps VALUES (1, 9223372036854775807);
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS events_truncated ON events;
CREATE TRIGGER events_truncated BEFORE TRUNCATE ON events FOR EACH STATEMENT EXECUTE FUNCTION on_events_truncated();

-- Who acts in this transaction, for its events. proxy_request: the id that the proxy gave this request, and that no client can
-- choose (Loom-Proxy-Request-ID). A proxy that lost the answer to a write sends it once more with the same id: what that id
-- made, in events and grants, is then answered as the first time.
CREATE OR REPLACE FUNCTION acting_as(actor text, instance uuid, request text, proxy_request text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('loom.actor', COALESCE(actor, ''), true),
            set_config('loom.instance_id', COALESCE(instance::text, ''), true),
            set_config('loom.request_id', COALESCE(request, ''), true),
            set_config('loom.proxy_request_id', COALESCE(proxy_request, ''), true);
END $$;


-- Entities --------------------------------------------------------------------------------------------------------

-- A reference to what is not there, told as a foreign key tells it.
CREATE OR REPLACE FUNCTION raise_unknown(field text, value text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% % does not exist', field, value
        USING ERRCODE = '23503', CONSTRAINT = 'entity_' || field || '_fkey',
              DETAIL = format('Key (%s)=(%s) is not present.', field, value);
END $$;

-- Whether HTTP can answer a JSON value and accept it again: no number is beyond a double, and it has at most 100 levels. A single
-- number of 5,000 digits, written by hand, made every list and the feed fail. What has fewer than 200 bytes cannot break
-- either rule.
CREATE OR REPLACE FUNCTION answerable(value jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT octet_length(value::text) < 200 OR NOT (
        jsonb_path_exists(value, 'strict $.** ? (@ > 1.7976931348623158e308 || @ < -1.7976931348623158e308)')
        OR jsonb_path_exists(value, 'strict $.**{100} ? (@.type() == "array" || @.type() == "object")'))
$$;

-- What a column may hold, where more than its type is asked. Domains, not CHECKs: those of a table are read and compiled anew
-- by each UPDATE, whichever columns it writes, and took a sixth of a claim's time.
DO $$
DECLARE
    name text;
    definition text;
BEGIN
    FOR name, definition IN VALUES
        ('jsonb_object', 'jsonb CHECK (jsonb_typeof(VALUE) = ''object'') CHECK (answerable(VALUE))'),
        ('texts', 'text[] CHECK (array_position(VALUE, NULL) IS NULL)'),
        ('moment', 'timestamptz CHECK (VALUE BETWEEN ''0001-01-01 00:00+00'' AND ''9999-12-31 23:59:59.999999+00'')'),
        ('counter', 'integer CHECK (VALUE >= 0)'),
        ('bead_priority', 'smallint CHECK (VALUE BETWEEN 0 AND 3)'),
        ('bead_status', 'text COLLATE "C" CHECK (VALUE IN (''open'', ''in_progress'', ''blocked'', ''closed''))'),
        ('agent_status', 'text CHECK (VALUE IN (''paused'', ''idle'', ''working'', ''deciding'', ''blocked'', ''dead''))')
    LOOP
        IF to_regtype(quote_ident(name)) IS NULL THEN
            EXECUTE format('CREATE DOMAIN %I AS %s', name, definition);
        END IF;
    END LOOP;
END $$;

-- Each kind of shared state is a table with id, version, created_at and updated_at. Every UPDATE adds 1 to the version and
-- writes one event, also by hand; but not one of columns that are derived or belong to a lease (they are listed with the
-- triggers, below). A function that sets the version itself writes its event itself. The checks hold off what cannot be
-- answered as JSON by HTTP, whoever writes it.
CREATE TABLE IF NOT EXISTS projects (
    id                 text        COLLATE "C" PRIMARY KEY,
    name               text        NOT NULL,
    description        text        NOT NULL DEFAULT '',
    git_repo           text        NOT NULL DEFAULT '',
    branch             text        NOT NULL DEFAULT '',
    beads_path         text        NOT NULL DEFAULT '',
    bead_prefix        text        COLLATE "C" NOT NULL DEFAULT 'bd',
    parent_id          text        COLLATE "C" REFERENCES projects,
    is_perpetual       boolean     NOT NULL DEFAULT false,
    is_sticky          boolean     NOT NULL DEFAULT false,
    git_strategy       text        NOT NULL DEFAULT 'direct' CHECK (git_strategy IN ('direct', 'branch-pr')),
    git_auth_method    text        NOT NULL DEFAULT 'none'
                                   CHECK (git_auth_method IN ('none', 'ssh', 'token', 'basic', 'git-helper')),
    git_credential_id  text        COLLATE "C",
    git_config_options jsonb_object NOT NULL DEFAULT '{}',
    work_dir           text,
    last_sync_at       moment,
    last_commit_hash   text,
    status             text        NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'closed', 'reopened')),
    context            jsonb_object NOT NULL DEFAULT '{}',
    attributes         jsonb_object NOT NULL DEFAULT '{}',
    due_date           moment,
    closed_at          timestamptz,
    version            bigint      NOT NULL DEFAULT 1,
    created_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at         timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE SEQUENCE IF NOT EXISTS project_numbers;

-- A closed project takes no beads: none is created in it, moved into it or reopened. on_bead_written() checks that with the
-- project's row locked FOR KEY SHARE, as a foreign key locks it. So closing takes FOR UPDATE, the one mode that conflicts with
-- it: a bead that is written at the same time is committed before, or refused. FOR SHARE there would do without this, but then
-- every change of a project would wait for the writers of its beads.
CREATE OR REPLACE FUNCTION on_project_written() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.status = 'closed' AND OLD.status <> 'closed' THEN
        PERFORM 1 FROM projects WHERE id = OLD.id FOR UPDATE;
    END IF;
    NEW.closed_at := CASE WHEN NEW.status = 'closed' THEN COALESCE(NEW.closed_at, clock_timestamp()) END;
    RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS a_project_written ON projects;
CREATE TRIGGER a_project_written BEFORE INSERT OR UPDATE OF status ON projects FOR EACH ROW
    EXECUTE FUNCTION on_project_written();

CREATE INDEX IF NOT EXISTS projects_parent ON projects (parent_id) WHERE parent_id IS NOT NULL;

CREATE TABLE IF NOT EXISTS providers (
    id                        text        COLLATE "C" PRIMARY KEY,
    name                      text        NOT NULL,
    type                      text        NOT NULL DEFAULT '',
    endpoint                  text        NOT NULL DEFAULT '',
    model                     text        NOT NULL DEFAULT '',
    configured_model          text        NOT NULL DEFAULT '',
    selected_model            text        NOT NULL DEFAULT '',
    selection_reason          text        NOT NULL DEFAULT '',
    model_score               float8      NOT NULL DEFAULT 0 CHECK (abs(model_score) < 'Infinity'),
    selected_gpu              text        NOT NULL DEFAULT '',
    gpu_constraints           jsonb_object,
    description               text        NOT NULL DEFAULT '',
    requires_key              boolean     NOT NULL DEFAULT false,
    key_id                    text        COLLATE "C" NOT NULL DEFAULT '',
    owner_id                  text        COLLATE "C" NOT NULL DEFAULT '',
    is_shared                 boolean     NOT NULL DEFAULT true,
    status                    text        NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'active', 'error')),
    last_heartbeat_at         moment,
    last_heartbeat_latency_ms bigint      NOT NULL DEFAULT 0,
    last_heartbeat_error      text        NOT NULL DEFAULT '',
    cost_per_mtoken           float8      NOT NULL DEFAULT 0 CHECK (abs(cost_per_mtoken) < 'Infinity'),
    context_window            bigint      NOT NULL DEFAULT 0,
    supports_function         boolean     NOT NULL DEFAULT false,
    supports_vision           boolean     NOT NULL DEFAULT false,
    supports_streaming        boolean     NOT NULL DEFAULT false,
    tags                      texts       NOT NULL DEFAULT '{}',
    metrics                   jsonb_object NOT NULL DEFAULT '{}',
    attributes                jsonb_object NOT NULL DEFAULT '{}',
    version                   bigint      NOT NULL DEFAULT 1,
    created_at                timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at                timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE OR REPLACE FUNCTION on_provider_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.name := COALESCE(NEW.name, NEW.id);
    IF NEW.requires_key AND NEW.key_id = '' THEN
        NEW.key_id := NEW.id || '-api-key';
    END IF;
    RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS a_provider_inserted ON providers;
CREATE TRIGGER a_provider_inserted BEFORE INSERT ON providers FOR EACH ROW EXECUTE FUNCTION on_provider_inserted();

-- heartbeat_at is null until the agent's first heartbeat: only then can it die of missing them. open_claims bounds the
-- beads that it has in progress; changed in the transaction that claims or ends a claim.
CREATE TABLE IF NOT EXISTS agents (
    id           text        COLLATE "C" PRIMARY KEY,
    name         text        NOT NULL,
    role         text        NOT NULL DEFAULT '',
    persona_name text        NOT NULL DEFAULT '',
    persona      jsonb_object,
    provider_id  text        COLLATE "C" REFERENCES providers ON DELETE SET NULL,
    status       agent_status NOT NULL DEFAULT 'idle',
    current_bead text        COLLATE "C",
    project_id   text        COLLATE "C" REFERENCES projects,
    position_id  text        COLLATE "C",
    capabilities texts       NOT NULL DEFAULT '{}',
    attributes   jsonb_object NOT NULL DEFAULT '{}',
    open_claims  counter     NOT NULL DEFAULT 0,
    started_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_active  timestamptz NOT NULL DEFAULT clock_timestamp(),
    heartbeat_at timestamptz,
    version      bigint      NOT NULL DEFAULT 1,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at   timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50, autovacuum_analyze_threshold = 5000);
CREATE INDEX IF NOT EXISTS agents_project ON agents (project_id, id);
CREATE INDEX IF NOT EXISTS agents_provider ON agents (provider_id) WHERE provider_id IS NOT NULL;

-- What all instances share: settings of Loom's own, which beat the environment and the file of each, and what agents keep
-- here. All of it is read at once, hence the bounds.
CREATE TABLE IF NOT EXISTS config (
    key        text        COLLATE "C" PRIMARY KEY,
    value      jsonb       NOT NULL,
    updated_by text        NOT NULL DEFAULT '',
    version    bigint      NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE OR REPLACE FUNCTION on_config_written() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.value := COALESCE(NEW.value, 'null'); -- JSON's null is a value, too
    IF NOT answerable(NEW.value) THEN
        RAISE EXCEPTION 'holds a number beyond 1.797e308, or is nested deeper than 100 levels'
            USING ERRCODE = '23514', COLUMN = NEW.key;
    ELSIF octet_length(NEW.value::text) > 65536 THEN -- as it is answered: 1e300 has 301 digits there
        RAISE EXCEPTION 'must have at most 64 KiB' USING ERRCODE = '23514', COLUMN = NEW.key;
    END IF;
    NEW.updated_by := COALESCE(NULLIF(current_setting('loom.actor', true), ''), session_user);
    RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS a_config_written ON config;
CREATE TRIGGER a_config_written BEFORE INSERT OR UPDATE OF value ON config FOR EACH ROW
    EXECUTE FUNCTION on_config_written();

CREATE OR REPLACE FUNCTION on_config_grown() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT count(*) > 1000 OR sum(octet_length(value::text)) > 1048576 FROM config) THEN
        RAISE EXCEPTION 'no room: all keys together are at most 1000, and their values 1 MiB'
            USING ERRCODE = '23514', COLUMN = 'value';
    END IF;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS config_grown ON config;
CREATE TRIGGER config_grown AFTER INSERT OR UPDATE ON config FOR EACH STATEMENT EXECUTE FUNCTION on_config_grown();

CREATE TABLE IF NOT EXISTS comments (
    id              text        COLLATE "C" PRIMARY KEY DEFAULT md5(random()::text || clock_timestamp()::text)::uuid::text,
    entity_type     text        NOT NULL CHECK (entity_type IN ('bead', 'project')),
    entity_id       text        COLLATE "C" NOT NULL,
    parent_id       text        COLLATE "C" REFERENCES comments ON DELETE CASCADE,
    project_id      text        COLLATE "C" NOT NULL,
    author_id       text        COLLATE "C" NOT NULL DEFAULT '',
    author_username text        NOT NULL DEFAULT '',
    content         text        NOT NULL,
    version         bigint      NOT NULL DEFAULT 1,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at      timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS comments_entity ON comments (entity_type, entity_id, created_at, id);
CREATE INDEX IF NOT EXISTS comments_parent ON comments (parent_id) WHERE parent_id IS NOT NULL;

-- A remark is on something that is there, an answer on the same thing as what it answers, and both go with it.
CREATE OR REPLACE FUNCTION on_comment_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.entity_type = 'bead' THEN
        PERFORM 1 FROM beads WHERE id = NEW.entity_id FOR KEY SHARE;
    ELSE
        PERFORM 1 FROM projects WHERE id = NEW.entity_id FOR KEY SHARE;
    END IF;
    IF NOT FOUND THEN
        PERFORM raise_unknown(NEW.entity_type || '_id', NEW.entity_id);
    END IF;
    IF NEW.parent_id IS NOT NULL AND NOT EXISTS (
        SELECT 1 FROM comments WHERE id = NEW.parent_id AND (entity_type, entity_id) = (NEW.entity_type, NEW.entity_id)) THEN
        PERFORM raise_unknown('parent_id', NEW.parent_id);
    END IF;
    RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS a_comment_inserted ON comments;
CREATE TRIGGER a_comment_inserted BEFORE INSERT ON comments FOR EACH ROW EXECUTE FUNCTION on_comment_inserted();

CREATE OR REPLACE FUNCTION on_commented_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM comments WHERE entity_type = TG_ARGV[0] AND entity_id = OLD.id;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS project_deleted_with_comments ON projects;
CREATE TRIGGER project_deleted_with_comments AFTER DELETE ON projects FOR EACH ROW
    EXECUTE FUNCTION on_commented_deleted('project');


-- Beads -----------------------------------------------------------------------------------------------------------

-- Whether a bead can be claimed now: by any agent, or by the one that it is reserved for. Inlined by the planner, so the
-- indexes of beads that use it match.
CREATE OR REPLACE FUNCTION is_ready(status bead_status, open_blockers counter, open_children counter, not_before timestamptz)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT status = 'open' AND open_blockers = 0 AND open_children = 0 AND not_before IS NULL;
$$;
-- When the clock alone changes a bead: its delay or its lease ends.
CREATE OR REPLACE FUNCTION wakes_at(not_before timestamptz, lease_expires_at timestamptz)
RETURNS timestamptz LANGUAGE sql IMMUTABLE AS 'SELECT COALESCE(not_before, lease_expires_at)';

-- A unit of work. blocked_by is the truth about dependencies, bead_blockers its index. A claim is fencing_token and the
-- lease; who has one is assigned_to. assigned_to of an open bead reserves it. open_blockers and open_children count what
-- keeps it from being ready; the triggers below keep them.
CREATE TABLE IF NOT EXISTS beads (
    id               text        COLLATE "C" PRIMARY KEY,
    type             text        COLLATE "C" NOT NULL DEFAULT 'task',
    title            text        NOT NULL,
    description      text        NOT NULL DEFAULT '',
    status           bead_status NOT NULL DEFAULT 'open',
    priority         bead_priority NOT NULL DEFAULT 2,
    project_id       text        COLLATE "C" NOT NULL REFERENCES projects,
    assigned_to      text        COLLATE "C",
    parent           text        COLLATE "C" REFERENCES beads ON DELETE SET NULL,
    blocked_by       texts       COLLATE "C" NOT NULL DEFAULT '{}',
    related_to       texts       COLLATE "C" NOT NULL DEFAULT '{}',
    tags             texts       NOT NULL DEFAULT '{}',
    context          jsonb_object NOT NULL DEFAULT '{}',
    attributes       jsonb_object NOT NULL DEFAULT '{}',
    due_date         moment,
    estimated_time   bigint,     -- minutes
    milestone_id     text        COLLATE "C",
    attempts         integer     NOT NULL DEFAULT 0,
    failures         integer     NOT NULL DEFAULT 0,
    blocked_reason   text,
    close_reason     text,
    closed_at        timestamptz,
    fencing_token    bigint,
    claimed_at       timestamptz,
    lease_seconds    integer,
    lease_expires_at timestamptz,
    not_before       timestamptz, -- delayed until then, after a failure
    open_blockers    counter     NOT NULL DEFAULT 0,
    open_children    counter     NOT NULL DEFAULT 0,
    version          bigint      NOT NULL DEFAULT 1,
    created_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at       timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 80, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_scale_factor = 0.02,
        autovacuum_vacuum_cost_delay = 0, vacuum_index_cleanup = on,
        -- A claim changes a status, and no plan: a small table is not analyzed again for each 400 claims.
        autovacuum_analyze_scale_factor = 0.05, autovacuum_analyze_threshold = 50000);
DO $$
BEGIN
    -- PostgreSQL 18 counts inserted rows against those that are not frozen: with the default, each 5,000 new beads would be
    -- a reason to go through all indexes. PostgreSQL 12 does not have this setting.
    IF current_setting('server_version_num')::integer >= 130000 THEN
        ALTER TABLE beads SET (autovacuum_vacuum_insert_threshold = 100000);
    END IF;
END $$;
CREATE SEQUENCE IF NOT EXISTS bead_numbers;

-- The best ready bead is the first of these: all, of one project, reserved for one agent. Narrow on purpose: a
-- claim steps over the entries that those before it have left, until a vacuum comes.
CREATE INDEX IF NOT EXISTS beads_ready ON beads (priority, COALESCE(due_date, 'infinity'), created_at)
    WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL;
CREATE INDEX IF NOT EXISTS beads_ready_project ON beads (project_id, priority, COALESCE(due_date, 'infinity'), created_at)
    WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL;
CREATE INDEX IF NOT EXISTS beads_reserved ON beads (assigned_to, priority, COALESCE(due_date, 'infinity'), created_at)
    WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NOT NULL;
-- What the clock alone changes: the delayed and the claimed.
CREATE INDEX IF NOT EXISTS beads_wakes_at ON beads (wakes_at(not_before, lease_expires_at))
    WHERE wakes_at(not_before, lease_expires_at) IS NOT NULL;
-- Lists: each column with the status, of which there are few, and then in the order of pages.
CREATE INDEX IF NOT EXISTS beads_in_status ON beads (status, id);
CREATE INDEX IF NOT EXISTS beads_in_project ON beads (project_id, status, id);
CREATE INDEX IF NOT EXISTS beads_assigned ON beads (assigned_to, status, id) WHERE assigned_to IS NOT NULL;
CREATE INDEX IF NOT EXISTS beads_of_type ON beads (type, status, id);
CREATE INDEX IF NOT EXISTS beads_parent ON beads (parent, id) WHERE parent IS NOT NULL;

-- The index of blocked_by, for both directions. Written by the triggers alone.
CREATE TABLE IF NOT EXISTS bead_blockers (
    bead_id    text COLLATE "C" NOT NULL,
    blocker_id text COLLATE "C" NOT NULL,
    PRIMARY KEY (blocker_id, bead_id)
);

-- One row per claim that has ended, as grants has for locks. Written by the trigger alone; kept for locks.history_days.
CREATE TABLE IF NOT EXISTS claims (
    fencing_token    bigint      PRIMARY KEY,
    bead_id          text        COLLATE "C" NOT NULL,
    agent_id         text        COLLATE "C" NOT NULL,
    claimed_at       timestamptz NOT NULL,
    lease_expires_at timestamptz NOT NULL,
    ended_at         timestamptz NOT NULL,
    ended_how        text        NOT NULL
                     CHECK (ended_how IN ('completed', 'failed', 'released', 'lapsed', 'agent-died', 'changed')),
    reason           text
);
CREATE INDEX IF NOT EXISTS claims_bead ON claims (bead_id, fencing_token);

-- Dependencies are changed by one transaction at a time, while none closes or reopens a bead: else two could make a
-- cycle together, or a bead that is closed while another comes to wait for it would keep that one waiting for ever. It
-- is taken before any bead's row.
CREATE OR REPLACE FUNCTION lock_bead_graph(to_change boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF to_change THEN
        PERFORM pg_advisory_xact_lock(hashtextextended('loom:bead-graph', 0));
    ELSE
        PERFORM pg_advisory_xact_lock_shared(hashtextextended('loom:bead-graph', 0));
    END IF;
END $$;

-- Locks what a change of a bead comes to, in one order: the others that it changes with what they wait for, its parent, and those
-- that wait for it when it is closed or opened. Else who has one of their rows and wants its own, as a heartbeat may, deadlocks
-- with it.
CREATE OR REPLACE FUNCTION lock_beads(bead text, others text[], turns boolean) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    above text := (SELECT parent FROM beads WHERE id = bead);
BEGIN
    -- Step by step: one statement for all took 270 us more, most of it planning.
    IF others <> '{}' THEN
        others := others || ARRAY(SELECT unnest(b.blocked_by || b.parent) FROM beads b WHERE b.id = ANY (others));
    END IF;
    IF turns THEN
        others := others || ARRAY(SELECT bead_id FROM bead_blockers WHERE blocker_id = bead);
    END IF;
    IF above IS NOT NULL THEN
        others := others || above;
    END IF;
    IF others <> '{}' THEN
        PERFORM 1 FROM beads WHERE id = ANY (others || bead) ORDER BY id FOR NO KEY UPDATE;
    END IF;
END $$;

-- Raises L0002 when the bead waits for itself: for its blockers and its children, for theirs, and so on. Only one that
-- has just come to wait for others can have closed a cycle, so every way back from it leads to it. Who changes several beads
-- sets loom.cycles to 'later', and looks when all is done: in between there may be a cycle.
CREATE OR REPLACE FUNCTION check_bead_cycle(start text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    came_from jsonb;
    cycle text[] := ARRAY[start];
BEGIN
    IF current_setting('loom.cycles', true) = 'later' THEN
        RETURN;
    END IF;
    WITH RECURSIVE waits (id, via) AS (
        SELECT start COLLATE "C", NULL::text COLLATE "C"
        UNION
        SELECT next.id, waits.id FROM waits
          CROSS JOIN LATERAL (
              SELECT unnest(b.blocked_by) AS id FROM beads b WHERE b.id = waits.id
              UNION ALL SELECT c.id FROM beads c WHERE c.parent = waits.id) AS next
         WHERE waits.via IS NULL OR waits.id <> start)
    -- The first way to each is the shortest, and never goes round another cycle of the same statement.
    SELECT jsonb_object_agg(id, via ORDER BY n DESC) INTO came_from
      FROM (SELECT id, via, row_number() OVER () AS n FROM waits) AS w WHERE via IS NOT NULL;
    IF came_from ? start THEN
        LOOP
            cycle := (came_from ->> cycle[1]) || cycle;
            EXIT WHEN cycle[1] = start;
        END LOOP;
        RAISE EXCEPTION 'beads would wait for each other: %', array_to_string(cycle, ' -> ')
            USING ERRCODE = 'L0002', DETAIL = to_jsonb(cycle)::text;
    END IF;
END $$;

-- What follows from a change that does not come from the functions for claims: its claim ends with it, times and counters
-- follow, and what it refers to is there. Raises L0003 for a bead that would come into a closed project.
CREATE OR REPLACE FUNCTION on_bead_written() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    missing text;
    closed boolean;
BEGIN
    IF TG_OP = 'INSERT' OR NEW.project_id <> OLD.project_id OR (OLD.status = 'closed' AND NEW.status <> 'closed') THEN
        -- The foreign key takes this lock, too, but only after this trigger, and says nothing of the status.
        SELECT p.status = 'closed' INTO closed FROM projects p WHERE p.id = NEW.project_id FOR KEY SHARE;
        IF closed THEN
            RAISE EXCEPTION 'project % is closed', NEW.project_id
                USING ERRCODE = 'L0003', DETAIL = NEW.project_id, HINT = 'Reopen it: UPDATE projects SET status = ''reopened''.';
        END IF;
    END IF;
    IF TG_OP = 'UPDATE' AND OLD.fencing_token IS NOT NULL
       AND (NEW.status, NEW.assigned_to) IS DISTINCT FROM (OLD.status, OLD.assigned_to) THEN
        IF NEW.status = OLD.status THEN
            NEW.status := 'open';
        ELSIF NEW.status <> 'closed' AND NEW.assigned_to = OLD.assigned_to THEN
            NEW.assigned_to := NULL;
        END IF;
        IF OLD.lease_expires_at <= clock_timestamp() AND NEW.attempts = OLD.attempts THEN -- it had, and nobody had noticed
            NEW.attempts := NEW.attempts + 1;
        END IF;
        NEW.fencing_token := NULL;
        NEW.claimed_at := NULL;
        NEW.lease_seconds := NULL;
        NEW.lease_expires_at := NULL;
    END IF;
    IF TG_OP = 'INSERT' OR NEW.status <> OLD.status THEN
        NEW.closed_at := CASE WHEN NEW.status = 'closed' THEN COALESCE(NEW.closed_at, clock_timestamp()) END;
        NEW.not_before := NULL;
        IF NEW.status <> 'closed' THEN
            NEW.close_reason := NULL;
        END IF;
        IF TG_OP = 'UPDATE' AND OLD.status = 'blocked' THEN
            NEW.blocked_reason := NULL;
            NEW.attempts := 0;
            NEW.failures := 0;
        END IF;
    END IF;
    IF NEW.assigned_to IS NOT NULL
       AND (TG_OP = 'INSERT' OR NEW.assigned_to IS DISTINCT FROM OLD.assigned_to OR (OLD.status = 'closed' AND NEW.status <> 'closed')) THEN
        PERFORM 1 FROM agents WHERE id = NEW.assigned_to FOR KEY SHARE;
        IF NOT FOUND AND TG_OP = 'UPDATE' AND NEW.assigned_to = OLD.assigned_to THEN
            NEW.assigned_to := NULL; -- reopened, and who closed it is gone
        ELSIF NOT FOUND THEN
            PERFORM raise_unknown('assigned_to', NEW.assigned_to);
        END IF;
    END IF;
    IF NEW.blocked_by <> COALESCE(OLD.blocked_by, '{}') THEN
        PERFORM lock_bead_graph(true);
        NEW.blocked_by := ARRAY(SELECT b FROM unnest(NEW.blocked_by) WITH ORDINALITY AS u (b, n) GROUP BY b ORDER BY min(n));
        SELECT count(*) FILTER (WHERE locked.status <> 'closed') INTO NEW.open_blockers
          FROM (SELECT status FROM beads WHERE id = ANY (NEW.blocked_by) AND id <> NEW.id ORDER BY id FOR SHARE) AS locked;
        -- What is there now stays until we commit.
        SELECT b INTO missing FROM unnest(NEW.blocked_by) AS b
         WHERE b <> NEW.id AND NOT EXISTS (SELECT 1 FROM beads WHERE id = b);
        IF FOUND THEN
            PERFORM raise_unknown('blocked_by', missing);
        END IF;
    END IF;
    -- No CHECK, which would cost the functions for claims 4 % and find nothing.
    IF num_nulls(NEW.fencing_token, NEW.claimed_at, NEW.lease_seconds, NEW.lease_expires_at) NOT IN (0, 4)
       OR (NEW.fencing_token IS NOT NULL AND (NEW.status <> 'in_progress' OR NEW.assigned_to IS NULL)) THEN
        RAISE EXCEPTION 'half a claim: to end one, change status or assigned_to' USING ERRCODE = '23514';
    END IF;
    RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS a_bead_inserted ON beads;
CREATE TRIGGER a_bead_inserted BEFORE INSERT ON beads FOR EACH ROW EXECUTE FUNCTION on_bead_written();
DROP TRIGGER IF EXISTS a_bead_updated ON beads;
CREATE TRIGGER a_bead_updated BEFORE UPDATE OF status, project_id, assigned_to, blocked_by, fencing_token, claimed_at,
                                               lease_seconds, lease_expires_at ON beads FOR EACH ROW
    WHEN (OLD.version = NEW.version) EXECUTE FUNCTION on_bead_written();

CREATE OR REPLACE FUNCTION on_bead_blockers_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM bead_blockers WHERE bead_id = NEW.id AND blocker_id = ANY (CASE WHEN TG_OP = 'UPDATE' THEN OLD.blocked_by END)
        AND blocker_id <> ALL (NEW.blocked_by);
    INSERT INTO bead_blockers (bead_id, blocker_id) SELECT NEW.id, unnest(NEW.blocked_by) ON CONFLICT DO NOTHING;
    IF TG_OP = 'UPDATE' OR NEW.parent IS NOT NULL OR NEW.id = ANY (NEW.blocked_by) THEN
        PERFORM check_bead_cycle(NEW.id);
    END IF;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS bead_inserted_with_blockers ON beads;
CREATE TRIGGER bead_inserted_with_blockers AFTER INSERT ON beads FOR EACH ROW
    WHEN (NEW.blocked_by <> '{}') EXECUTE FUNCTION on_bead_blockers_changed();
DROP TRIGGER IF EXISTS bead_blockers_changed ON beads;
CREATE TRIGGER bead_blockers_changed AFTER UPDATE OF blocked_by ON beads FOR EACH ROW
    WHEN (NEW.blocked_by <> OLD.blocked_by) EXECUTE FUNCTION on_bead_blockers_changed();

-- The agent has one claim less: that of the bead.
CREATE OR REPLACE FUNCTION uncount_claim(agent text, bead text) RETURNS void LANGUAGE sql AS $$
    UPDATE agents SET open_claims = GREATEST(open_claims - 1, 0), -- by hand, it may have been set to anything
                      current_bead = CASE WHEN current_bead = bead THEN (
                          SELECT b.id FROM beads b WHERE b.assigned_to = agent AND b.status = 'in_progress'
                             AND b.fencing_token IS NOT NULL AND b.id <> bead ORDER BY b.claimed_at DESC LIMIT 1)
                          ELSE current_bead END
     WHERE id = agent;
$$;

-- A claim has ended: its history, its agent's counter, and the file locks that were taken for it. how: unless
-- loom.claim_ended says.
CREATE OR REPLACE FUNCTION note_claim_ended(was beads, how text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO claims VALUES (
        was.fencing_token, was.id, was.assigned_to, was.claimed_at, was.lease_expires_at, clock_timestamp(),
        COALESCE(NULLIF(current_setting('loom.claim_ended', true), ''), how),
        NULLIF(current_setting('loom.claim_reason', true), ''));
    PERFORM uncount_claim(was.assigned_to, was.id);
    PERFORM set_config('loom.ended_how', 'released', true);
    DELETE FROM distributed_locks
     WHERE metadata ->> 'bead_id' = was.id AND metadata ? 'file_path' AND lock_name LIKE 'file:%'
       AND expires_at > clock_timestamp();
    PERFORM set_config('loom.ended_how', '', true);
END $$;
CREATE INDEX IF NOT EXISTS distributed_locks_bead ON distributed_locks ((metadata ->> 'bead_id')) WHERE metadata ? 'file_path';

-- The counters of those that wait for a bead, when it is closed, reopened, moved or gone; and its claim, if it ended. One trigger for
-- both, with a short condition: each is read and compiled anew by each UPDATE.
CREATE OR REPLACE FUNCTION on_bead_turned() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    me text := CASE TG_OP WHEN 'DELETE' THEN OLD.id ELSE NEW.id END;
    was_open boolean := TG_OP <> 'INSERT' AND OLD.status <> 'closed';
    is_open boolean := TG_OP <> 'DELETE' AND NEW.status <> 'closed';
    old_parent text := CASE WHEN was_open THEN OLD.parent END;
    new_parent text := CASE WHEN is_open THEN NEW.parent END;
    turned boolean := TG_OP = 'DELETE' OR (TG_OP = 'UPDATE' AND was_open <> is_open);
BEGIN
    IF TG_OP <> 'UPDATE' OR turned OR OLD.parent IS DISTINCT FROM NEW.parent THEN
        -- Their rows first, in one order, and only then who waits: one that was waited for here may wait for others by now.
        PERFORM 1 FROM beads WHERE id IN (
            SELECT bead_id FROM bead_blockers WHERE turned AND blocker_id = me UNION ALL SELECT unnest(ARRAY[old_parent, new_parent]))
          ORDER BY id FOR NO KEY UPDATE;
        IF FOUND AND TG_OP = 'DELETE' THEN
            UPDATE beads SET blocked_by = array_remove(blocked_by, me)
             WHERE id IN (SELECT bead_id FROM bead_blockers WHERE blocker_id = me);
        ELSIF FOUND AND turned THEN
            UPDATE beads SET open_blockers = open_blockers + CASE WHEN is_open THEN 1 ELSE -1 END
             WHERE id IN (SELECT bead_id FROM bead_blockers WHERE blocker_id = me);
        END IF;
        IF old_parent IS DISTINCT FROM new_parent THEN
            UPDATE beads SET open_children = open_children - 1 WHERE id = old_parent;
            UPDATE beads SET open_children = open_children + 1 WHERE id = new_parent;
        END IF;
        IF TG_OP = 'DELETE' THEN
            DELETE FROM bead_blockers WHERE blocker_id = ANY (OLD.blocked_by) AND bead_id = me;
        ELSIF NEW.parent IS NOT NULL AND (NEW.parent = me OR (TG_OP = 'UPDATE' AND NEW.parent IS DISTINCT FROM OLD.parent)) THEN
            PERFORM check_bead_cycle(NEW.parent);
        END IF;
    END IF;
    IF TG_OP <> 'INSERT' AND OLD.fencing_token <> COALESCE(CASE TG_OP WHEN 'UPDATE' THEN NEW.fencing_token END, 0) THEN
        PERFORM note_claim_ended(OLD, CASE WHEN TG_OP = 'UPDATE' AND NEW.attempts > OLD.attempts
                                            AND OLD.lease_expires_at <= clock_timestamp() THEN 'lapsed' ELSE 'changed' END);
    END IF;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS bead_inserted_with_parent ON beads;
CREATE TRIGGER bead_inserted_with_parent AFTER INSERT ON beads FOR EACH ROW
    WHEN (NEW.parent IS NOT NULL) EXECUTE FUNCTION on_bead_turned();
DROP TRIGGER IF EXISTS bead_turned ON beads;
CREATE TRIGGER bead_turned AFTER UPDATE ON beads FOR EACH ROW
    WHEN (OLD.claimed_at IS NOT NULL OR NEW.claimed_at IS NULL) -- not for a new claim
    EXECUTE FUNCTION on_bead_turned();
DROP TRIGGER IF EXISTS bead_deleted ON beads;
CREATE TRIGGER bead_deleted AFTER DELETE ON beads FOR EACH ROW EXECUTE FUNCTION on_bead_turned();
DROP TRIGGER IF EXISTS bead_deleted_with_comments ON beads;
CREATE TRIGGER bead_deleted_with_comments AFTER DELETE ON beads FOR EACH ROW EXECUTE FUNCTION on_commented_deleted('bead');

-- By hand, too, the graph is locked before the rows.
CREATE OR REPLACE FUNCTION on_beads_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM lock_bead_graph(true);
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS beads_deleted ON beads;
CREATE TRIGGER beads_deleted BEFORE DELETE ON beads FOR EACH STATEMENT EXECUTE FUNCTION on_beads_deleted();

-- An agent that is gone has no beads: what it had claimed is open again.
CREATE OR REPLACE FUNCTION on_agent_ended() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM give_back_beads_of(OLD.id, setting('beads.max_failures', 5), setting('beads.max_attempts', 20));
    IF TG_OP = 'DELETE' THEN
        UPDATE beads SET assigned_to = NULL WHERE assigned_to = OLD.id AND status IN ('open', 'in_progress', 'blocked');
    END IF;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS agent_deleted ON agents;
CREATE TRIGGER agent_deleted AFTER DELETE ON agents FOR EACH ROW EXECUTE FUNCTION on_agent_ended();
DROP TRIGGER IF EXISTS agent_died ON agents;
CREATE TRIGGER agent_died AFTER UPDATE OF status ON agents FOR EACH ROW
    WHEN (NEW.status = 'dead' AND OLD.status <> 'dead') EXECUTE FUNCTION on_agent_ended();

-- A shared setting that is a whole number from 1 to 1000; or else the fallback, as for one put there by hand that is none.
CREATE OR REPLACE FUNCTION setting(name text, fallback integer) RETURNS integer LANGUAGE sql STABLE AS $$
    SELECT COALESCE((SELECT (value #>> '{}')::integer FROM config
                      WHERE key = name AND value::text ~ '^([1-9][0-9]{0,2}|1000)$'), fallback);
$$;


-- Changes of entities ---------------------------------------------------------------------------------------------

-- The types are those of the original.
CREATE OR REPLACE FUNCTION event_type(kind text, op text, was jsonb, becomes jsonb) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT kind || '.' || CASE
        WHEN op = 'DELETE' THEN 'deleted'
        WHEN kind = 'config' THEN 'updated'
        WHEN op = 'INSERT' THEN CASE kind WHEN 'agent' THEN 'spawned' WHEN 'provider' THEN 'registered' ELSE 'created' END
        WHEN kind = 'bead' AND becomes ->> 'status' = 'closed' AND was ->> 'status' <> 'closed' THEN 'completed'
        WHEN kind = 'bead' AND becomes ->> 'assigned_to' <> COALESCE(was ->> 'assigned_to', '') THEN 'assigned'
        WHEN kind IN ('bead', 'agent') AND becomes ->> 'status' <> was ->> 'status' THEN 'status_change'
        ELSE 'updated' END;
$$;

-- The version and the event of a change. Arguments: the kind, and the columns that have no version.
CREATE OR REPLACE FUNCTION on_entity_changed() RETURNS trigger LANGUAGE plpgsql SET timezone = 'UTC' AS $$
DECLARE
    kind text := TG_ARGV[0];
    silent text[] := TG_ARGV[1]::text[];
    was jsonb := '{}';
    becomes jsonb := '{}';
    entity jsonb;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        NEW.version := OLD.version + 1;
        NEW.updated_at := clock_timestamp();
    END IF;
    IF TG_OP <> 'INSERT' THEN
        was := to_jsonb(OLD);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        becomes := to_jsonb(NEW);
    END IF;
    entity := was || becomes;
    INSERT INTO events (type, entity_type, entity_id, version, project_id, timestamp, changes) VALUES (
        event_type(kind, TG_OP, was, becomes), kind, COALESCE(entity ->> 'id', entity ->> 'key'),
        (entity ->> 'version')::bigint + (TG_OP = 'DELETE')::int,
        CASE kind WHEN 'project' THEN entity ->> 'id' ELSE entity ->> 'project_id' END,
        CASE TG_OP WHEN 'DELETE' THEN clock_timestamp() ELSE (entity ->> 'updated_at')::timestamptz END,
        (SELECT COALESCE(jsonb_object_agg(e.key, e.value), '{}') FROM jsonb_each(becomes) AS e
          WHERE e.value IS DISTINCT FROM COALESCE(was -> e.key, 'null') AND e.key <> ALL (silent)));
    RETURN NEW;
END $$;

-- Emptied by hand, too, a table leaves nothing behind that depends on its rows.
CREATE OR REPLACE FUNCTION on_entities_truncated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('DELETE FROM %I', TG_TABLE_NAME);
    RETURN NULL;
END $$;

DO $$
DECLARE
    kind text;
    tbl text;
    silent text[];
BEGIN
    FOR kind, tbl, silent IN VALUES
        ('project', 'projects', '{}'::text[]),
        ('provider', 'providers', '{}'),
        ('agent', 'agents', '{current_bead, open_claims, last_active, heartbeat_at}'),
        ('bead', 'beads', '{lease_seconds, lease_expires_at, claimed_at, not_before, open_blockers, open_children}'),
        ('config', 'config', '{}'),
        ('comment', 'comments', '{}')
    LOOP
        silent := silent || '{version, updated_at}';
        EXECUTE format('DROP TRIGGER IF EXISTS entity_updated ON %I', tbl);
        EXECUTE format('CREATE TRIGGER entity_updated BEFORE UPDATE OF %s ON %I FOR EACH ROW'
                       ' WHEN (OLD.version = NEW.version) EXECUTE FUNCTION on_entity_changed(%L, %L)',
                       (SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute
                         WHERE attrelid = tbl::regclass AND attnum > 0 AND NOT attisdropped AND attname <> ALL (silent)),
                       tbl, kind, silent);
        EXECUTE format('DROP TRIGGER IF EXISTS entity_created_or_deleted ON %I', tbl);
        EXECUTE format('CREATE TRIGGER entity_created_or_deleted AFTER INSERT OR DELETE ON %I FOR EACH ROW'
                       ' EXECUTE FUNCTION on_entity_changed(%L, %L)', tbl, kind, silent);
        EXECUTE format('DROP TRIGGER IF EXISTS entities_truncated ON %I', tbl);
        EXECUTE format('CREATE TRIGGER entities_truncated BEFORE TRUNCATE ON %I FOR EACH STATEMENT'
                       ' EXECUTE FUNCTION on_entities_truncated()', tbl);
    END LOOP;
END $$;

-- An entity as it is answered.
CREATE OR REPLACE FUNCTION as_json(t comments) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT to_jsonb(t) || CASE t.entity_type
        WHEN 'bead' THEN jsonb_build_object('bead_id', t.entity_id, 'edited', t.version > 1)
        ELSE jsonb_build_object('comment', t.content, 'timestamp', t.created_at) END;
$$;
CREATE OR REPLACE FUNCTION as_json(t projects) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT to_jsonb(t) || jsonb_build_object(
        'agents', ARRAY(SELECT id FROM agents WHERE project_id = t.id ORDER BY id),
        'comments', (SELECT COALESCE(jsonb_agg(as_json(c) ORDER BY c.created_at, c.id), '[]') FROM comments c
                      WHERE c.entity_type = 'project' AND c.entity_id = t.id));
$$;
CREATE OR REPLACE FUNCTION as_json(t providers) RETURNS jsonb LANGUAGE sql STABLE AS 'SELECT to_jsonb(t)';
CREATE OR REPLACE FUNCTION as_json(t agents) RETURNS jsonb LANGUAGE sql STABLE AS 'SELECT to_jsonb(t)';
CREATE OR REPLACE FUNCTION as_json(t config) RETURNS jsonb LANGUAGE sql STABLE AS 'SELECT to_jsonb(t)';
-- PL/pgSQL keeps the plans: an SQL function with a subquery is planned again at each call.
CREATE OR REPLACE FUNCTION as_json(t beads) RETURNS jsonb LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN to_jsonb(t) || jsonb_build_object(
        'not_before', CASE WHEN t.not_before > clock_timestamp() THEN t.not_before END,
        'blocks', ARRAY(SELECT bead_id FROM bead_blockers WHERE blocker_id = t.id ORDER BY bead_id),
        'children', ARRAY(SELECT id FROM beads WHERE parent = t.id ORDER BY id));
END $$;

-- An id of our own for a new entity.
CREATE OR REPLACE FUNCTION new_entity_id(kind text, given jsonb) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    -- What can stand in a path, and is short enough for one.
    stem text := regexp_replace(left(regexp_replace(given ->> 'name', '[\u0001-\u001f\u007f-\u009f/\ufffd]', '-', 'g'), 150), '^\.{1,2}$', '-');
    made text;
    taken boolean;
BEGIN
    FOR n IN 1 .. 1000000 LOOP
        made := CASE kind
            WHEN 'bead' THEN COALESCE((SELECT bead_prefix FROM projects WHERE id = given ->> 'project_id'), 'bd') || '-'
                             || to_char(nextval('bead_numbers'), 'FM000000000000000000')
            WHEN 'project' THEN 'proj-' || nextval('project_numbers')
            WHEN 'agent' THEN 'agent-' || floor(extract(epoch FROM clock_timestamp())) || '-' || stem
                              || CASE WHEN n > 1 THEN '-' || n ELSE '' END
            WHEN 'provider' THEN stem || CASE WHEN n > 1 THEN '-' || n ELSE '' END
            ELSE md5(random()::text || clock_timestamp()::text)::uuid::text END;
        IF kind = 'bead' THEN
            made := regexp_replace(made, '-0{1,15}(\d{3,})$', '-\1');
        ELSIF kind IN ('agent', 'provider') THEN -- of a name, which another may have just now
            PERFORM pg_advisory_xact_lock(hashtextextended(kind || ':' || made, 0));
        END IF;
        EXECUTE format('SELECT EXISTS (SELECT 1 FROM %I WHERE id = $1)', kind || 's') INTO taken USING made;
        EXIT WHEN NOT taken;
    END LOOP;
    RETURN made;
END $$;

-- RFC 7396: what a JSON merge patch makes of a value.
CREATE OR REPLACE FUNCTION merge_patch(target jsonb, patch jsonb) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF jsonb_typeof(patch) <> 'object' THEN
        RETURN patch;
    END IF;
    IF target IS NULL OR jsonb_typeof(target) <> 'object' THEN
        target := '{}';
    END IF;
    RETURN COALESCE(
        (SELECT jsonb_object_agg(COALESCE(p.key, t.key), CASE WHEN p.key IS NULL THEN t.value ELSE merge_patch(t.value, p.value) END)
           FROM jsonb_each(target) AS t FULL JOIN jsonb_each(patch) AS p ON p.key = t.key
          WHERE p.value IS DISTINCT FROM 'null'), '{}');
END $$;

-- Enters a change: takes the names of what it changes, in order, and fences it by the grants that the request presents.
-- Returns a grant that holds one of the names from outside, if there is one.
CREATE OR REPLACE FUNCTION enter_names(names text[], fences jsonb) RETURNS distributed_locks LANGUAGE plpgsql AS $$
DECLARE
    name text;
    held distributed_locks;
BEGIN
    FOR name IN SELECT DISTINCT n COLLATE "C" FROM unnest(names) AS n WHERE n IS NOT NULL ORDER BY 1 LOOP
        PERFORM pg_advisory_xact_lock(hashtextextended(name, 0));
        IF fences IS NULL OR NOT fences ? name THEN
            SELECT * INTO held FROM distributed_locks l WHERE l.lock_name = name AND l.expires_at > clock_timestamp();
            IF FOUND THEN
                RETURN held;
            END IF;
        END IF;
    END LOOP;
    IF fences IS NOT NULL THEN
        PERFORM loom_fence(f.key, f.value::bigint) FROM (SELECT * FROM jsonb_each_text(fences) ORDER BY key COLLATE "C") AS f;
    END IF;
    RETURN NULL;
END $$;

-- What has changed of an entity since a version, and who did it; NULL when the events of that time are gone.
CREATE OR REPLACE FUNCTION changes_since(kind text, key text, since bigint, until bigint) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN count(DISTINCT e.version) = until - since THEN COALESCE(jsonb_object_agg(c.field, e.actor ORDER BY e.place)
           FILTER (WHERE c.field IS NOT NULL), '{}') END
      FROM events e LEFT JOIN LATERAL jsonb_object_keys(e.changes - '{claim_ended, reason}'::text[]) AS c (field) ON true
     WHERE e.entity_type = kind AND e.entity_id = key AND e.version > since AND e.version <= until
       AND e.place > COALESCE( -- its creation: before, the id may have been another's
           (SELECT max(f.place) FROM events f WHERE f.entity_type = kind AND f.entity_id = key AND f.version = 1), 0);
$$;

-- Whether the version of what is there, or null for nothing, meets a condition of RFC 9110: '*' is met by whatever is there,
-- an array by one of its versions.
CREATE OR REPLACE FUNCTION version_matches(version jsonb, condition jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT COALESCE(version IS NOT NULL AND (condition = '"*"' OR condition @> version), false);
$$;

-- Changes one entity, in one round trip: names, rows, decision, change and event. action: 'create', 'upsert', 'put' (what is
-- given replaces), 'patch' (objects are merged), 'delete'. if_match, if_none_match: conditions, see version_matches(), or
-- null; with merge, changes of other fields since the versions of if_match do no harm.
-- outcome: 'created', 'updated', 'deleted'; 'repeated' (the proxy sends the request once more, and its first time made the
-- current version, or the deletion); 'lock-held' (detail: the grant), 'not-found', 'taken', 'stale' (by if_match; detail: who
-- changed which field), 'there' (by if_none_match).
CREATE OR REPLACE FUNCTION change_entity(
    kind text, key text, action text, patch jsonb, if_match jsonb, if_none_match jsonb, merge boolean, fences jsonb,
    OUT outcome text, OUT entity jsonb, OUT detail jsonb) LANGUAGE plpgsql AS $$
DECLARE
    tbl text := CASE kind WHEN 'config' THEN 'config' ELSE kind || 's' END;
    key_column text := CASE kind WHEN 'config' THEN 'key' ELSE 'id' END;
    own jsonb := patch - '{blocks, children}'::text[];
    blocks text[] := ARRAY(SELECT jsonb_array_elements_text(NULLIF(patch -> 'blocks', 'null')));
    children text[] := ARRAY(SELECT jsonb_array_elements_text(NULLIF(patch -> 'children', 'null')));
    others text[] := '{}';
    names text[];
    columns text;
    held distributed_locks;
    found jsonb;
    proxy_request text := NULLIF(current_setting('loom.proxy_request_id', true), '');
    links boolean;
    other text;
    turned boolean;
    moved boolean;
BEGIN
    IF key IS NULL THEN
        key := new_entity_id(kind, patch);
    END IF;
    IF patch ? 'blocks' OR (kind = 'bead' AND action = 'delete') THEN
        others := others || blocks || ARRAY(SELECT bead_id FROM bead_blockers WHERE blocker_id = key);
    END IF;
    IF patch ? 'children' OR (kind = 'bead' AND action = 'delete') THEN
        others := others || children || ARRAY(SELECT id FROM beads WHERE parent = key);
    END IF;
    names := ARRAY(SELECT kind || ':' || k FROM unnest(others || key) AS k);
    IF kind = 'bead' THEN
        names := names || ('agent:' || (patch ->> 'assigned_to'));
    ELSIF kind = 'agent' AND action = 'delete' THEN
        names := names || ARRAY(SELECT 'bead:' || id FROM beads WHERE assigned_to = key AND status IN ('open', 'in_progress', 'blocked'));
    ELSIF kind = 'provider' AND action = 'delete' THEN
        names := names || ARRAY(SELECT 'agent:' || id FROM agents WHERE provider_id = key);
    END IF;
    IF proxy_request IS NOT NULL THEN
        -- With the names, since the first time may still be under way. Before the grants that the request presents: one of
        -- them may have ended with what the first time did.
        PERFORM pg_advisory_xact_lock(hashtextextended(n, 0))
           FROM (SELECT DISTINCT u COLLATE "C" AS n FROM unnest(names) AS u WHERE u IS NOT NULL ORDER BY 1) AS sorted;
        IF (SELECT e.proxy_request_id = proxy_request AND (e.type = kind || '.deleted') = (action = 'delete') FROM events e
             WHERE e.entity_type = kind AND e.entity_id = key ORDER BY e.place DESC LIMIT 1) THEN
            outcome := 'repeated';
            EXECUTE format('SELECT as_json(t) FROM %I t WHERE %I = $1', tbl, key_column) INTO entity USING key;
            RETURN;
        END IF;
    END IF;
    held := enter_names(names, fences);
    IF held.lock_name IS NOT NULL THEN
        outcome := 'lock-held';
        detail := to_jsonb(held);
        RETURN;
    END IF;
    IF kind = 'bead' THEN
        links := action = 'delete' OR patch ?| '{blocked_by, parent, blocks, children}';
        IF links OR patch ? 'status' THEN
            PERFORM lock_bead_graph(links);
            turned := patch ? 'status' AND (SELECT b.status = 'closed' FROM beads b WHERE b.id = key) <> (patch ->> 'status' = 'closed');
            IF links OR turned THEN
                PERFORM lock_beads(key, others || (patch ->> 'parent')
                                        || ARRAY(SELECT jsonb_array_elements_text(NULLIF(patch -> 'blocked_by', 'null'))), turned);
            END IF;
        END IF;
    ELSIF kind = 'agent' AND (action = 'delete' OR patch ->> 'status' = 'dead') THEN
        -- Beads before agents, as in a claim.
        PERFORM 1 FROM beads WHERE assigned_to = key AND status IN ('open', 'in_progress', 'blocked') ORDER BY id FOR UPDATE;
    END IF;

    EXECUTE format('SELECT to_jsonb(t) FROM %I t WHERE %I = $1 FOR %s', tbl, key_column,
                   CASE action WHEN 'delete' THEN 'UPDATE' ELSE 'NO KEY UPDATE' END) INTO found USING key;
    -- As RFC 9110 has it: conditions only once the request would be served without them, and If-Match first.
    IF found IS NULL AND action NOT IN ('create', 'upsert') THEN
        outcome := 'not-found';
    ELSIF found IS NOT NULL AND action = 'create' THEN
        outcome := 'taken';
    ELSIF found IS NULL AND if_match IS NOT NULL THEN
        outcome := 'stale';
    ELSIF if_match IS NOT NULL AND NOT version_matches(found -> 'version', if_match) THEN
        detail := changes_since(kind, key, (SELECT max(v::bigint) FROM jsonb_array_elements_text(if_match) AS v),
                                (found ->> 'version')::bigint);
        IF NOT merge OR detail IS NULL OR detail ?| ARRAY(SELECT jsonb_object_keys(patch)) THEN
            outcome := 'stale';
        END IF;
    END IF;
    IF outcome IS NULL AND version_matches(found -> 'version', if_none_match) THEN
        outcome := 'there';
        detail := NULL;
    END IF;
    IF outcome IN ('stale', 'there') THEN
        EXECUTE format('SELECT as_json(t) FROM %I t WHERE %I = $1', tbl, key_column) INTO entity USING key;
    END IF;
    IF outcome IS NOT NULL THEN
        RETURN;
    END IF;

    IF action = 'delete' THEN
        EXECUTE format('DELETE FROM %I WHERE %I = $1', tbl, key_column) USING key;
        outcome := 'deleted';
        RETURN;
    END IF;
    IF found IS NULL THEN
        own := own || jsonb_build_object(key_column, key, 'created_at', clock_timestamp());
        own := own || jsonb_build_object('updated_at', own -> 'created_at');
    ELSIF action = 'patch' THEN
        own := (SELECT jsonb_object_agg(p.key, CASE jsonb_typeof(p.value) WHEN 'object' THEN merge_patch(found -> p.key, p.value)
                                               ELSE p.value END) FROM jsonb_each(own) AS p);
    END IF;
    IF others <> '{}' THEN
        PERFORM set_config('loom.cycles', 'later', true);
    END IF;
    SELECT string_agg(quote_ident(k), ', ') INTO columns FROM jsonb_object_keys(own) AS k;
    IF found IS NULL THEN
        EXECUTE format('INSERT INTO %1$I (%2$s) SELECT %2$s FROM jsonb_populate_record(NULL::%1$I, $1)', tbl, columns) USING own;
    ELSIF columns IS NOT NULL THEN
        EXECUTE format('UPDATE %1$I SET (%2$s) = (SELECT %2$s FROM jsonb_populate_record(NULL::%1$I, $1)) WHERE %3$I = $2',
                       tbl, columns, key_column) USING own, key;
    END IF;

    FOREACH other IN ARRAY ARRAY(SELECT DISTINCT o COLLATE "C" FROM unnest(others) AS o ORDER BY 1) LOOP
        IF other = ANY (blocks || children) AND NOT EXISTS (SELECT 1 FROM beads WHERE id = other) THEN
            PERFORM raise_unknown(CASE WHEN other = ANY (blocks) THEN 'blocks' ELSE 'children' END, other);
        END IF;
        SELECT patch ? 'blocks' AND (key = ANY (b.blocked_by)) <> (other = ANY (blocks)),
               patch ? 'children' AND (b.parent IS NOT DISTINCT FROM key) <> (other = ANY (children))
          INTO turned, moved FROM beads b WHERE b.id = other;
        IF turned OR moved THEN
            UPDATE beads SET
                blocked_by = CASE WHEN NOT turned THEN blocked_by WHEN other = ANY (blocks) THEN blocked_by || key
                                  ELSE array_remove(blocked_by, key) END,
                parent = CASE WHEN NOT moved THEN parent WHEN other = ANY (children) THEN key END
             WHERE id = other;
        END IF;
    END LOOP;
    IF others <> '{}' THEN
        PERFORM set_config('loom.cycles', '', true);
        PERFORM check_bead_cycle(key);
    END IF;
    outcome := CASE WHEN found IS NULL THEN 'created' ELSE 'updated' END;
    EXECUTE format('SELECT as_json(t) FROM %I t WHERE %I = $1', tbl, key_column) INTO entity USING key;
END $$;

-- How many beads of a project are not closed.
CREATE OR REPLACE FUNCTION open_beads(project text) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT count(*) FROM beads WHERE project_id = project AND status IN ('open', 'in_progress', 'blocked');
$$;

-- Closes a project that has no open beads and is not perpetual. outcome: 'closed'; 'not-ready' (detail: open_beads, is_perpetual); 'not-found'; 'lock-held' (detail: the grant).
CREATE OR REPLACE FUNCTION close_project(key text, fences jsonb, OUT outcome text, OUT entity jsonb, OUT detail jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    held distributed_locks := enter_names(ARRAY['project:' || key], fences);
    p projects;
    unfinished bigint;
BEGIN
    IF held.lock_name IS NOT NULL THEN
        outcome := 'lock-held';
        detail := to_jsonb(held);
        RETURN;
    END IF;
    SELECT * INTO p FROM projects WHERE id = key FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 'not-found';
        RETURN;
    END IF;
    unfinished := open_beads(key);
    IF unfinished = 0 AND NOT p.is_perpetual THEN
        -- Waits for the transactions that are writing beads of it, see on_project_written(). Their beads count, too.
        PERFORM 1 FROM projects WHERE id = key FOR UPDATE;
        unfinished := open_beads(key);
    END IF;
    IF unfinished > 0 OR p.is_perpetual THEN
        outcome := 'not-ready';
        detail := jsonb_build_object('open_beads', unfinished, 'is_perpetual', p.is_perpetual);
        RETURN;
    END IF;
    UPDATE projects SET status = 'closed' WHERE id = key RETURNING * INTO p;
    outcome := 'closed';
    entity := as_json(p);
END $$;

-- Sets shared values, key -> value, all or none; one that is as it was makes no version. outcome: 'shared', 'lock-held'
-- (detail: the grant).
CREATE OR REPLACE FUNCTION share_values(given jsonb, fences jsonb, OUT outcome text, OUT detail jsonb) LANGUAGE plpgsql AS $$
DECLARE
    held distributed_locks := enter_names(ARRAY(SELECT 'config:' || k FROM jsonb_object_keys(given) AS k), fences);
BEGIN
    IF held.lock_name IS NOT NULL THEN
        outcome := 'lock-held';
        detail := to_jsonb(held);
        RETURN;
    END IF;
    INSERT INTO config AS c (key, value) SELECT g.key, g.value FROM jsonb_each(given) AS g ORDER BY g.key COLLATE "C"
        ON CONFLICT (key) DO UPDATE SET value = excluded.value WHERE c.value <> excluded.value;
    outcome := 'shared';
END $$;

-- Creates beads, all or none. given: with ids and their `place` in the answer, in an order in which each comes after those that
-- it is blocked by; `blocks` and `children` name only beads that are there already. outcome: 'created', 'taken' (detail: the
-- id), 'lock-held' (detail: the grant).
CREATE OR REPLACE FUNCTION create_beads(given jsonb, fences jsonb, OUT outcome text, OUT entities jsonb, OUT detail jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp();
    made text[] := ARRAY(SELECT it ->> 'id' FROM jsonb_array_elements(given) AS it);
    linked jsonb := (SELECT COALESCE(jsonb_agg(jsonb_build_object(
                           'field', field, 'bead', it -> 'id', 'other', other, 'place', it -> 'place')), '[]')
                       FROM jsonb_array_elements(given) AS it CROSS JOIN unnest('{blocks, children}'::text[]) AS field
                       CROSS JOIN jsonb_array_elements_text(it -> field) AS other);
    others text[] := ARRAY(SELECT DISTINCT x ->> 'other' FROM jsonb_array_elements(linked) AS x);
    held distributed_locks := enter_names(ARRAY(
        SELECT 'bead:' || o FROM unnest(others) AS o
        UNION ALL SELECT 'agent:' || (it ->> 'assigned_to') FROM jsonb_array_elements(given) AS it), fences);
    names text;
    values_given text;
    missing record;
BEGIN
    IF held.lock_name IS NULL THEN -- the names of new beads are only looked at: nobody else can be at what is not there
        SELECT l.* INTO held FROM distributed_locks l
         WHERE l.lock_name = ANY (ARRAY(SELECT 'bead:' || m FROM unnest(made) AS m)) AND l.expires_at > clock_timestamp()
           AND NOT COALESCE(fences ? l.lock_name, false) LIMIT 1;
    END IF;
    IF held.lock_name IS NOT NULL THEN
        outcome := 'lock-held';
        detail := to_jsonb(held);
        RETURN;
    END IF;
    PERFORM lock_bead_graph(true);
    PERFORM lock_beads(NULL, others || ARRAY(
        SELECT it ->> 'parent' FROM jsonb_array_elements(given) AS it
        UNION ALL SELECT jsonb_array_elements_text(it -> 'blocked_by') FROM jsonb_array_elements(given) AS it), false);
    SELECT to_jsonb(b.id) INTO detail FROM beads b WHERE b.id = ANY (made) LIMIT 1;
    IF FOUND THEN
        outcome := 'taken';
        RETURN;
    END IF;
    SELECT x ->> 'field' AS field, x ->> 'other' AS id INTO missing FROM jsonb_array_elements(linked) AS x
     WHERE NOT EXISTS (SELECT 1 FROM beads b WHERE b.id = x ->> 'other') LIMIT 1;
    IF FOUND THEN
        PERFORM raise_unknown(missing.field, missing.id);
    END IF;

    PERFORM set_config('loom.cycles', 'later', true);
    -- In one statement, so that parents may come after their children. Absent keys get their columns' defaults.
    SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum),
           string_agg(format('COALESCE(r.%I, %s)', a.attname, COALESCE(pg_get_expr(d.adbin, d.adrelid), 'NULL')), ', ' ORDER BY a.attnum)
      INTO names, values_given
      FROM pg_attribute a LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
     WHERE a.attrelid = 'beads'::regclass AND a.attnum > 0 AND NOT a.attisdropped;
    EXECUTE format('INSERT INTO beads (%s) SELECT %s FROM jsonb_array_elements($1) WITH ORDINALITY AS g (it, n)'
                   ' CROSS JOIN LATERAL jsonb_populate_record(NULL::beads, g.it) AS r ORDER BY g.n', names, values_given)
      USING (SELECT jsonb_agg(g.it || jsonb_build_object('created_at', w.at, 'updated_at', w.at) ORDER BY g.n)
               FROM jsonb_array_elements(given) WITH ORDINALITY AS g (it, n)
               CROSS JOIN LATERAL (SELECT t + (g.it ->> 'place')::int * INTERVAL '1 us' AS at) AS w);
    UPDATE beads b SET blocked_by = b.blocked_by || l.added
      FROM (SELECT x ->> 'other' AS other, array_agg(x ->> 'bead' ORDER BY (x ->> 'place')::int) AS added
              FROM jsonb_array_elements(linked) AS x
             WHERE x ->> 'field' = 'blocks' GROUP BY 1) AS l WHERE b.id = l.other;
    UPDATE beads b SET parent = x ->> 'bead' FROM jsonb_array_elements(linked) AS x
     WHERE x ->> 'field' = 'children' AND b.id = x ->> 'other';
    PERFORM set_config('loom.cycles', '', true);
    -- A cycle of new beads by blocked_by alone would have no order; another one leads to a new bead from what is waiting for it
    -- already, or from its parent.
    PERFORM check_bead_cycle(b.id) FROM beads b
      WHERE b.id = ANY (made) AND (b.parent IS NOT NULL OR linked @> jsonb_build_array(jsonb_build_object('bead', b.id)));
    outcome := 'created';
    SELECT jsonb_agg(as_json(b) ORDER BY b.created_at) INTO entities FROM beads b WHERE b.id = ANY (made);
END $$;


-- Claims ----------------------------------------------------------------------------------------------------------

-- The order of locking: names, the graph of the beads, beads by id, agents by id, then what follows from the change. Who has
-- an agent's row without its beads' only tries for beads, names and further agents, and passes over what others are at.

-- An agent is dead when it is marked so, or when it has sent heartbeats once and none for so long, unless the database was
-- away meanwhile.
CREATE OR REPLACE FUNCTION agent_is_dead(a agents, dead_after interval) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT a.status = 'dead' OR COALESCE(a.heartbeat_at < clock_timestamp() - dead_after AND heartbeats_count(), false);
$$;

-- Takes the name of a change, for who has rows already and must not wait. False when others are at it or hold it from
-- outside; a look in the same statement as the lock would miss a grant that was made in between.
CREATE OR REPLACE FUNCTION try_name(name text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended(name, 0)) THEN
        RETURN false;
    END IF;
    RETURN NOT EXISTS (SELECT 1 FROM distributed_locks l WHERE l.lock_name = name AND l.expires_at > clock_timestamp());
END $$;

-- Ends a claim that was not completed: the bead is open again, or blocked when it has failed too often. The caller has the
-- bead's row locked. how: as in claims.ended_how.
CREATE OR REPLACE FUNCTION give_back(b beads, how text, why text, delay interval, max_failures integer, max_attempts integer)
RETURNS beads LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp();
    n_attempts integer := b.attempts + (how <> 'released')::int;
    n_failures integer := b.failures + (how = 'failed')::int;
    stop text := CASE WHEN how = 'released' THEN NULL
                      WHEN n_failures >= max_failures THEN format('failed %s times, the last time: %s', n_failures, COALESCE(why, how))
                      WHEN n_attempts >= max_attempts THEN format('claimed %s times without success, the last time: %s',
                                                                  n_attempts, COALESCE(why, how)) END;
BEGIN
    PERFORM set_config('loom.claim_ended', how, true), set_config('loom.claim_reason', COALESCE(why, ''), true);
    UPDATE beads SET status = CASE WHEN stop IS NULL THEN 'open' ELSE 'blocked' END, assigned_to = NULL, fencing_token = NULL,
                     claimed_at = NULL, lease_seconds = NULL, lease_expires_at = NULL,
                     attempts = n_attempts, failures = n_failures, blocked_reason = stop,
                     not_before = CASE WHEN how = 'failed' AND stop IS NULL AND delay > INTERVAL '0' THEN t + delay END,
                     version = version + 1, updated_at = t
     WHERE id = b.id RETURNING * INTO b;
    PERFORM set_config('loom.claim_ended', '', true), set_config('loom.claim_reason', '', true);
    INSERT INTO events (type, entity_type, entity_id, version, project_id, timestamp, changes)
    VALUES ('bead.status_change', 'bead', b.id, b.version, b.project_id, t, jsonb_build_object(
        'status', b.status, 'assigned_to', NULL, 'fencing_token', NULL, 'attempts', b.attempts, 'failures', b.failures,
        'blocked_reason', b.blocked_reason, 'claim_ended', how, 'reason', why));
    RETURN b;
END $$;

-- Opens again what nobody has renewed in time, a batch at a time; passes over what others are at, or hold from outside.
CREATE OR REPLACE FUNCTION lapse_claims(batch integer, max_failures integer, max_attempts integer) RETURNS SETOF beads
LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp(); -- a variable can be looked up in an index, the function cannot
    b beads;
BEGIN
    FOR b IN SELECT * FROM beads WHERE fencing_token IS NOT NULL AND wakes_at(not_before, lease_expires_at) <= t
                AND NOT EXISTS (SELECT 1 FROM distributed_locks l
                                 WHERE l.lock_name = 'bead:' || beads.id AND l.expires_at > clock_timestamp())
              ORDER BY wakes_at(not_before, lease_expires_at) LIMIT batch FOR NO KEY UPDATE OF beads SKIP LOCKED
    LOOP
        PERFORM 1 FROM agents WHERE id = b.assigned_to FOR NO KEY UPDATE SKIP LOCKED;
        IF (FOUND OR NOT EXISTS (SELECT 1 FROM agents WHERE id = b.assigned_to)) AND try_name('bead:' || b.id) THEN
            RETURN NEXT b;
            PERFORM give_back(b, 'lapsed', NULL, NULL, max_failures, max_attempts);
        END IF;
    END LOOP;
END $$;

-- Gives back what a dead agent has claimed. What others are at, or hold from outside, is left to lapse at once.
CREATE OR REPLACE FUNCTION give_back_beads_of(agent text, max_failures integer, max_attempts integer) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    b beads;
BEGIN
    FOR b IN SELECT * FROM beads WHERE assigned_to = agent AND status = 'in_progress' AND fencing_token IS NOT NULL
              ORDER BY id FOR NO KEY UPDATE
    LOOP
        IF try_name('bead:' || b.id) THEN
            -- A lease that is over has lapsed: the agent may have been told so.
            PERFORM give_back(b, CASE WHEN b.lease_expires_at <= clock_timestamp() THEN 'lapsed' ELSE 'agent-died' END,
                              NULL, NULL, max_failures, max_attempts);
        ELSE
            UPDATE beads SET lease_expires_at = LEAST(lease_expires_at, clock_timestamp()) WHERE id = b.id;
        END IF;
    END LOOP;
END $$;

-- Marks an agent dead that has missed its heartbeats; what it had is open again. False when it lives, or others are at it.
CREATE OR REPLACE FUNCTION end_dead_agent(agent text, dead_after interval, max_failures integer, max_attempts integer)
RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    a agents;
BEGIN
    IF NOT try_name('agent:' || agent) THEN
        RETURN false;
    END IF;
    PERFORM 1 FROM beads WHERE assigned_to = agent AND fencing_token IS NOT NULL AND status = 'in_progress'
      ORDER BY id FOR NO KEY UPDATE;
    SELECT * INTO a FROM agents WHERE id = agent FOR NO KEY UPDATE;
    IF NOT FOUND OR a.status = 'dead' OR NOT agent_is_dead(a, dead_after) THEN
        RETURN false;
    END IF;
    PERFORM give_back_beads_of(agent, max_failures, max_attempts);
    UPDATE agents SET status = 'dead' WHERE id = agent;
    RETURN true;
END $$;

-- Gives the bead to the agent; the caller has locked its row and the names of both, compared the fencing identity, and counts it
-- in the agent's row. Answers the bead, as as_json() does, but as text, for less work. Null when one of `names` is
-- held from outside: a look that began before its name was locked would miss a grant made in between.
CREATE OR REPLACE FUNCTION take_bead(wanted text, agent text, lease integer, names text[]) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp();
    bead text;
    new_version bigint;
    project text;
    token bigint;
BEGIN
    UPDATE beads SET status = 'in_progress', assigned_to = agent, fencing_token = nextval('fencing_tokens'), claimed_at = t,
                     lease_seconds = lease, lease_expires_at = t + make_interval(secs => lease), not_before = NULL,
                     version = version + 1, updated_at = t
     WHERE id = wanted
       AND NOT EXISTS (SELECT 1 FROM distributed_locks l WHERE l.lock_name = ANY (names) AND l.expires_at > t)
    RETURNING version, project_id, fencing_token,
              '{"blocks":' || array_to_json(ARRAY(SELECT bead_id FROM bead_blockers WHERE blocker_id = wanted ORDER BY bead_id))
              || ',"children":' || array_to_json(ARRAY(SELECT c.id FROM beads c WHERE c.parent = wanted ORDER BY c.id)) || ','
              -- without its first character: as bytes, since to count its characters was 4 % of a claim
              || convert_from(substr(convert_to(to_json(beads)::text, 'UTF8'), 2), 'UTF8')
      INTO new_version, project, token, bead;
    IF FOUND THEN
        INSERT INTO events (type, entity_type, entity_id, version, project_id, timestamp, changes)
        VALUES ('bead.assigned', 'bead', wanted, new_version, project, t, jsonb_build_object(
            'status', 'in_progress', 'assigned_to', agent, 'fencing_token', token));
    END IF;
    RETURN bead;
END $$;

-- Enters a claim: the names, the agent's among them, so that only one claim at a time adds to its counter.
-- outcome: null, or 'unknown-agent', 'lock-held' (detail: the grant).
CREATE OR REPLACE FUNCTION enter_claim(agent text, names text[], fences jsonb, OUT outcome text, OUT detail jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    held distributed_locks := enter_names(ARRAY['agent:' || agent] || names, fences);
    state text;
BEGIN
    IF held.lock_name IS NOT NULL THEN
        outcome := 'lock-held';
        detail := to_jsonb(held);
        RETURN;
    END IF;
    SELECT status INTO state FROM agents WHERE id = agent;
    IF NOT FOUND THEN
        outcome := 'unknown-agent';
    ELSIF state = 'dead' THEN -- it lives
        UPDATE agents SET status = 'idle', heartbeat_at = CASE WHEN heartbeat_at IS NOT NULL THEN clock_timestamp() END
         WHERE id = agent;
    END IF;
END $$;

-- Opens again what has lapsed, before a claim looks what there is. Our own agent's row first: the others are only tried.
CREATE OR REPLACE FUNCTION lapse_before_claim(agent text, max_failures integer, max_attempts integer) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp(); -- a variable can be looked up in an index, the function cannot
BEGIN
    -- The first one, which the index answers: for EXISTS the planner may choose to read all beads.
    IF (SELECT wakes_at(not_before, lease_expires_at) FROM beads WHERE wakes_at(not_before, lease_expires_at) <= t
         ORDER BY wakes_at(not_before, lease_expires_at) LIMIT 1) IS NOT NULL THEN
        PERFORM 1 FROM agents WHERE id = agent FOR NO KEY UPDATE;
        PERFORM lapse_claims(100, max_failures, max_attempts);
    END IF;
END $$;

-- The agent's beads, when they are as many as it may have at once; else null.
CREATE OR REPLACE FUNCTION busy_with(agent text, most integer) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT to_jsonb(ARRAY(SELECT b.id FROM beads b WHERE b.assigned_to = agent AND b.status = 'in_progress'
                             AND b.fencing_token IS NOT NULL ORDER BY b.id))
      FROM agents a WHERE a.id = agent AND a.open_claims >= most;
$$;

-- Claims the best ready bead: by priority, then due date, then age. outcome: 'claimed', 'nothing', 'agent-busy' (detail: its
-- beads), 'unknown-project', or as enter_claim. In one value, JSON: a row of several took 4 % longer.
CREATE OR REPLACE FUNCTION claim_next(
    agent text, lease integer, most integer, max_failures integer, max_attempts integer, fences jsonb,
    project text DEFAULT NULL, kinds text[] DEFAULT NULL, wanted text[] DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    outcome text;
    detail jsonb;
    bead text;
    passed text[] := '{}';
    -- the best of those reserved for the agent
    mine text;
    mine_priority smallint;
    mine_due timestamptz;
    mine_created_at timestamptz;
    best text;
    plain boolean := fences IS NULL; -- first as if there were nothing else to be done
    prepared boolean := false;
    t timestamptz;
BEGIN
    outcome := pg_advisory_xact_lock(hashtextextended('agent:' || agent, 0)); -- cheaper than PERFORM: no query
    t := clock_timestamp();
    FOR n IN 1 .. 100 LOOP
        IF NOT plain AND NOT prepared THEN
            prepared := true;
            SELECT e.outcome, e.detail INTO outcome, detail FROM enter_claim(agent, '{}', fences) AS e;
            IF outcome IS NOT NULL THEN
                RETURN json_build_object('outcome', outcome, 'detail', detail)::text;
            END IF;
            PERFORM compare_fencing_identity();
            PERFORM lapse_before_claim(agent, max_failures, max_attempts);
            detail := busy_with(agent, most);
            IF detail IS NOT NULL THEN
                RETURN json_build_object('outcome', 'agent-busy', 'detail', detail)::text;
            END IF;
            UPDATE beads SET not_before = NULL
             WHERE id IN (SELECT id FROM beads
                           WHERE status = 'open' AND not_before IS NOT NULL AND wakes_at(not_before, lease_expires_at) <= t
                           ORDER BY wakes_at(not_before, lease_expires_at) LIMIT 100 FOR NO KEY UPDATE SKIP LOCKED);
        END IF;
        mine := NULL;
        IF NOT plain THEN
            -- Not locked yet, since a free one may be better.
            SELECT id, priority, COALESCE(due_date, 'infinity'), created_at
              INTO mine, mine_priority, mine_due, mine_created_at FROM beads b
             WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to = agent
               AND (project IS NULL OR project_id = project) AND (kinds IS NULL OR type = ANY (kinds))
               AND (wanted IS NULL OR tags @> wanted) AND id <> ALL (passed)
               AND NOT EXISTS (SELECT 1 FROM distributed_locks l
                                WHERE l.lock_name = 'bead:' || b.id AND l.expires_at > clock_timestamp())
             ORDER BY priority, COALESCE(due_date, 'infinity'), created_at LIMIT 1;
        END IF;
        IF mine IS NULL THEN
            mine_priority := 4;
            mine_due := 'infinity';
            mine_created_at := 'infinity';
        END IF;
        IF plain AND project IS NULL THEN
            SELECT id INTO best FROM beads b
             WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL
               AND (kinds IS NULL OR type = ANY (kinds)) AND (wanted IS NULL OR tags @> wanted)
             ORDER BY priority, COALESCE(due_date, 'infinity'), created_at LIMIT 1 FOR NO KEY UPDATE OF b SKIP LOCKED;
        ELSIF project IS NULL THEN
            SELECT id INTO best FROM beads b
             WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL
               AND (priority, COALESCE(due_date, 'infinity'), created_at) <= (mine_priority, mine_due, mine_created_at)
               AND (kinds IS NULL OR type = ANY (kinds)) AND (wanted IS NULL OR tags @> wanted) AND id <> ALL (passed)
               AND NOT EXISTS (SELECT 1 FROM distributed_locks l WHERE l.lock_name = 'bead:' || b.id AND l.expires_at > t)
             ORDER BY priority, COALESCE(due_date, 'infinity'), created_at LIMIT 1 FOR NO KEY UPDATE OF b SKIP LOCKED;
        ELSE
            SELECT id INTO best FROM beads b
             WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL
               AND project_id = project
               AND (priority, COALESCE(due_date, 'infinity'), created_at) <= (mine_priority, mine_due, mine_created_at)
               AND (kinds IS NULL OR type = ANY (kinds)) AND (wanted IS NULL OR tags @> wanted) AND id <> ALL (passed)
               AND (plain OR NOT EXISTS (SELECT 1 FROM distributed_locks l WHERE l.lock_name = 'bead:' || b.id AND l.expires_at > t))
             ORDER BY priority, COALESCE(due_date, 'infinity'), created_at LIMIT 1 FOR NO KEY UPDATE OF b SKIP LOCKED;
        END IF;
        IF best IS NULL AND mine IS NOT NULL THEN
            SELECT id INTO best FROM beads
             WHERE id = mine AND is_ready(status, open_blockers, open_children, not_before) AND assigned_to = agent FOR NO KEY UPDATE SKIP LOCKED;
        END IF;
        -- Its name is only tried: who waits for a name with a row in hand deadlocks with who has them the other way round.
        IF best IS NOT NULL AND pg_try_advisory_xact_lock(hashtextextended('bead:' || best, 0)) THEN
            -- What nearly every claim finds, and so looks at only now: nothing had to be done first, and no bead is reserved for it.
            UPDATE agents SET open_claims = open_claims + 1, current_bead = best, last_active = t,
                              heartbeat_at = CASE WHEN heartbeat_at IS NOT NULL THEN t END
             WHERE id = agent AND (NOT plain OR (
                   status <> 'dead' AND open_claims < most
                   AND (SELECT fencing_identity FROM cluster) = fencing_identity_now()
                   AND (SELECT wakes_at(not_before, lease_expires_at) FROM beads WHERE wakes_at(not_before, lease_expires_at) <= t
                         ORDER BY wakes_at(not_before, lease_expires_at) LIMIT 1) IS NULL
                   AND NOT EXISTS (SELECT 1 FROM beads
                                    WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to = agent)));
            IF FOUND THEN
                bead := take_bead(best, agent, lease, ARRAY['bead:' || best] || CASE WHEN plain THEN 'agent:' || agent END);
                IF bead IS NOT NULL THEN
                    RETURN '{"outcome":"claimed","bead":' || bead || '}';
                END IF;
                PERFORM uncount_claim(agent, best);
            END IF;
        END IF;
        EXIT WHEN best IS NULL AND mine IS NULL AND NOT plain;
        IF plain THEN
            plain := false;
        ELSE
            passed := passed || COALESCE(best, mine);
        END IF;
    END LOOP;
    RETURN json_build_object('outcome', CASE WHEN project IS NULL OR EXISTS (SELECT 1 FROM projects WHERE id = project)
                                              THEN 'nothing' ELSE 'unknown-project' END)::text;
END $$;

CREATE OR REPLACE FUNCTION open_children_of(bead text) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT to_jsonb(ARRAY(SELECT c.id FROM beads c WHERE c.parent = bead AND c.status <> 'closed' ORDER BY c.id));
$$;

-- Claims one bead. outcome: 'claimed', 'same' (the agent's claim of before), 'not-found', 'bead-claimed' or reserved (detail:
-- agent_id, alive, lease_expires_at), 'bead-blocked' (detail: blocked_by, children, not_before, blocked_reason), 'bead-closed'
-- (detail: closed_at), 'agent-busy' (detail: its beads), or as enter_claim.
CREATE OR REPLACE FUNCTION claim_bead(
    wanted text, agent text, lease integer, most integer, max_failures integer, max_attempts integer, dead_after interval,
    fences jsonb, OUT outcome text, OUT bead jsonb, OUT detail jsonb) LANGUAGE plpgsql AS $$
DECLARE
    b beads;
    dead boolean;
BEGIN
    SELECT e.outcome, e.detail INTO outcome, detail FROM enter_claim(agent, ARRAY['bead:' || wanted], fences) AS e;
    IF outcome IS NOT NULL THEN
        RETURN;
    END IF;
    SELECT * INTO b FROM beads WHERE id = wanted FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 'not-found';
        RETURN;
    END IF;
    IF b.fencing_token IS NOT NULL AND b.assigned_to = agent AND b.lease_expires_at > clock_timestamp() THEN
        UPDATE beads SET lease_seconds = lease,
                         lease_expires_at = GREATEST(lease_expires_at, clock_timestamp() + make_interval(secs => lease))
         WHERE id = wanted RETURNING * INTO b;
        outcome := 'same';
        bead := as_json(b);
        RETURN;
    END IF;
    SELECT agent_is_dead(a, dead_after) INTO dead FROM agents a WHERE a.id = b.assigned_to;
    IF b.fencing_token IS NOT NULL AND (dead OR b.lease_expires_at <= clock_timestamp()) THEN
        PERFORM 1 FROM agents WHERE id IN (agent, b.assigned_to) ORDER BY id FOR NO KEY UPDATE;
        b := give_back(b, CASE WHEN b.lease_expires_at <= clock_timestamp() THEN 'lapsed' ELSE 'agent-died' END,
                       NULL, NULL, max_failures, max_attempts);
    END IF;
    IF b.status = 'closed' THEN
        outcome := 'bead-closed';
        detail := jsonb_build_object('closed_at', b.closed_at);
    ELSIF b.assigned_to <> agent OR (b.status = 'in_progress' AND b.assigned_to IS NULL) THEN
        outcome := 'bead-claimed';
        detail := jsonb_build_object('agent_id', b.assigned_to, 'alive', NOT dead, 'lease_expires_at', b.lease_expires_at);
    ELSIF b.status = 'blocked' OR b.open_blockers > 0 OR b.open_children > 0 OR b.not_before > clock_timestamp() THEN
        outcome := 'bead-blocked';
        detail := jsonb_build_object(
            'blocked_by', ARRAY(SELECT x.id FROM beads x WHERE x.id = ANY (b.blocked_by) AND x.status <> 'closed' ORDER BY x.id),
            'children', open_children_of(wanted),
            'not_before', CASE WHEN b.not_before > clock_timestamp() THEN b.not_before END,
            'blocked_reason', b.blocked_reason);
    ELSE
        IF busy_with(agent, most) IS NOT NULL THEN
            PERFORM lapse_before_claim(agent, max_failures, max_attempts); -- its own may be over
        END IF;
        detail := busy_with(agent, most);
        IF detail IS NOT NULL THEN
            outcome := 'agent-busy';
        ELSE
            outcome := 'claimed';
            PERFORM compare_fencing_identity();
            UPDATE agents SET open_claims = open_claims + 1, current_bead = wanted, last_active = clock_timestamp(),
                              heartbeat_at = CASE WHEN heartbeat_at IS NOT NULL THEN clock_timestamp() END
             WHERE id = agent;
            bead := take_bead(wanted, agent, lease, '{}')::jsonb;
        END IF;
    END IF;
END $$;

-- Extends a claim; never revives one, never shortens it with `extend`. The row first, only then the clock. outcome: 'renewed',
-- 'claim-lost'.
CREATE OR REPLACE FUNCTION renew_claim(
    wanted text, token bigint, lease integer, extend boolean, fences jsonb, OUT outcome text, OUT bead jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    b beads;
BEGIN
    PERFORM enter_names('{}', fences);
    PERFORM 1 FROM beads WHERE id = wanted FOR NO KEY UPDATE;
    UPDATE beads SET lease_seconds = COALESCE(lease, lease_seconds),
                     lease_expires_at = GREATEST(CASE WHEN extend THEN lease_expires_at END,
                                                 clock_timestamp() + make_interval(secs => COALESCE(lease, lease_seconds)))
     WHERE id = wanted AND fencing_token = token AND lease_expires_at > clock_timestamp() RETURNING * INTO b;
    outcome := CASE WHEN FOUND THEN 'renewed' ELSE 'claim-lost' END;
    IF FOUND THEN
        bead := as_json(b);
    END IF;
END $$;

-- Ends a claim by its holder. how: 'completed' (why: the close reason; more is merged into the context), 'failed' (delay: before
-- it is ready again, else by the number of failures), 'released'. outcome: 'ended', 'repeated' (it had ended in this way before),
-- 'claim-lost', 'open-children' (detail: their ids; nothing was done: the claim and its lease are as they were), 'lock-held'
-- (detail: the grant), 'not-found'.
CREATE OR REPLACE FUNCTION end_claim(
    wanted text, token bigint, how text, why text, more jsonb, delay integer, max_failures integer, max_attempts integer,
    fences jsonb, OUT outcome text, OUT bead jsonb, OUT detail jsonb) LANGUAGE plpgsql AS $$
DECLARE
    b beads;
    held distributed_locks := enter_names(ARRAY['bead:' || wanted], fences);
    t timestamptz;
BEGIN
    IF held.lock_name IS NOT NULL THEN
        outcome := 'lock-held';
        detail := to_jsonb(held);
        RETURN;
    END IF;
    IF how = 'completed' THEN
        PERFORM lock_bead_graph(false);
        PERFORM lock_beads(wanted, '{}', true);
    END IF;
    SELECT * INTO b FROM beads WHERE id = wanted FOR NO KEY UPDATE;
    t := clock_timestamp();
    IF NOT FOUND THEN
        outcome := 'not-found';
        RETURN;
    ELSIF b.fencing_token IS DISTINCT FROM token OR b.lease_expires_at <= t THEN
        outcome := CASE WHEN EXISTS (SELECT 1 FROM claims WHERE fencing_token = token AND bead_id = wanted AND ended_how = how)
                        THEN 'repeated' ELSE 'claim-lost' END;
        bead := as_json(b);
        RETURN;
    ELSIF how = 'completed' AND b.open_children > 0 THEN
        -- A transaction that adds or reopens a child counts it in this row, which is locked here: none is added before the end.
        outcome := 'open-children';
        detail := open_children_of(wanted);
        RETURN;
    END IF;
    outcome := 'ended';
    IF NULLIF(current_setting('loom.actor', true), '') IS NULL THEN
        PERFORM set_config('loom.actor', b.assigned_to, true);
    END IF;
    IF how = 'completed' THEN
        PERFORM set_config('loom.claim_ended', how, true), set_config('loom.claim_reason', COALESCE(why, ''), true);
        UPDATE beads SET status = 'closed', fencing_token = NULL, claimed_at = NULL, lease_seconds = NULL, lease_expires_at = NULL,
                         closed_at = t, close_reason = why,
                         context = CASE WHEN more IS NULL THEN context ELSE merge_patch(context, more) END,
                         version = version + 1, updated_at = t
         WHERE id = wanted RETURNING * INTO b;
        PERFORM set_config('loom.claim_ended', '', true), set_config('loom.claim_reason', '', true);
        INSERT INTO events (type, entity_type, entity_id, version, project_id, timestamp, changes)
        VALUES ('bead.completed', 'bead', wanted, b.version, b.project_id, t, jsonb_build_object(
            'status', 'closed', 'fencing_token', NULL, 'closed_at', b.closed_at, 'close_reason', b.close_reason)
            || CASE WHEN more IS NULL THEN '{}' ELSE jsonb_build_object('context', b.context) END);
        bead := as_json(b);
    ELSE
        bead := as_json(give_back(
            b, how, why, make_interval(secs => COALESCE(delay, LEAST(30 * 2 ^ LEAST(b.failures, 10), 3600))),
            max_failures, max_attempts));
    END IF;
END $$;

-- An agent says that it lives, and which of its claims (bead -> token) it still works on: those are extended, each by its own
-- lease. It takes no name: who holds agent:ID from outside must not let the agent die. extended: bead -> its new end; lost:
-- bead -> how its claim ended, or null. outcome: 'alive', 'unknown-agent'.
CREATE OR REPLACE FUNCTION heartbeat_agent(
    agent text, new_status text, claims jsonb, fences jsonb, OUT outcome text, OUT extended jsonb, OUT lost jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    state text;
    c record;
    ends timestamptz;
BEGIN
    PERFORM enter_names('{}', fences);
    IF NOT EXISTS (SELECT 1 FROM agents WHERE id = agent) THEN
        outcome := 'unknown-agent';
        RETURN;
    END IF;
    extended := '{}';
    lost := '{}';
    FOR c IN SELECT key AS bead, value::bigint AS token FROM jsonb_each_text(claims) ORDER BY key COLLATE "C" LOOP
        PERFORM 1 FROM beads WHERE id = c.bead FOR NO KEY UPDATE;
        UPDATE beads SET lease_expires_at = GREATEST(lease_expires_at, clock_timestamp() + make_interval(secs => lease_seconds))
         WHERE id = c.bead AND fencing_token = c.token AND assigned_to = agent AND lease_expires_at > clock_timestamp()
        RETURNING lease_expires_at INTO ends;
        IF FOUND THEN
            extended := extended || jsonb_build_object(c.bead, ends);
        ELSE
            lost := lost || jsonb_build_object(c.bead, COALESCE(
                (SELECT ended_how FROM claims WHERE fencing_token = c.token AND bead_id = c.bead AND agent_id = agent),
                (SELECT 'lapsed' FROM beads WHERE id = c.bead AND fencing_token = c.token AND assigned_to = agent)));
        END IF;
    END LOOP;
    SELECT status INTO state FROM agents WHERE id = agent FOR NO KEY UPDATE;
    IF state = 'dead' AND new_status IS NULL THEN
        new_status := 'idle';
    END IF;
    IF state <> new_status THEN
        UPDATE agents SET status = new_status WHERE id = agent;
    END IF;
    UPDATE agents SET heartbeat_at = clock_timestamp(), last_active = clock_timestamp() WHERE id = agent;
    outcome := 'alive';
END $$;


-- File locks ------------------------------------------------------------------------------------------------------

-- Rows of distributed_locks, named file:PROJECT:PATH, owned by agent:ID, with the metadata file_path, project_id, agent_id and,
-- when taken for a bead, bead_id: it ends with the bead's claim, see note_claim_ended().

-- Takes one for the agent that `about` names. The bead's row first, and it stays locked: its claim cannot end, and find no lock
-- to end with it, between a look at it and the commit. outcome: 'new', 'same', 'held', 'promised' as acquire_lock (held:
-- the grant that has it); 'claim-lost' (holder: who has the bead, or null).
CREATE OR REPLACE FUNCTION take_file_lock(
    name text, about jsonb, instance uuid, ttl interval, dead_after interval, fences jsonb,
    OUT outcome text, OUT held jsonb, OUT holder jsonb) LANGUAGE plpgsql AS $$
DECLARE
    agent text := about ->> 'agent_id';
    b beads;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(name, 0));
    PERFORM raise_unknown('project_id', about ->> 'project_id')
      WHERE NOT EXISTS (SELECT 1 FROM projects WHERE id = about ->> 'project_id');
    PERFORM raise_unknown('agent_id', agent) WHERE NOT EXISTS (SELECT 1 FROM agents WHERE id = agent);
    IF about ? 'bead_id' THEN
        SELECT * INTO b FROM beads WHERE id = about ->> 'bead_id' FOR SHARE;
        IF NOT FOUND THEN
            PERFORM raise_unknown('bead_id', about ->> 'bead_id');
        ELSIF b.fencing_token IS NULL OR b.lease_expires_at <= clock_timestamp() OR b.assigned_to <> agent THEN
            outcome := 'claim-lost';
            SELECT jsonb_build_object('agent_id', a.id, 'alive', NOT agent_is_dead(a, dead_after), 'lease_expires_at', b.lease_expires_at)
              INTO holder FROM agents a WHERE a.id = b.assigned_to AND b.lease_expires_at > clock_timestamp();
            RETURN;
        END IF;
    END IF;
    PERFORM enter_names('{}', fences);
    -- What it was taken for stays when it is asked for again without a bead.
    about := COALESCE((SELECT metadata FROM distributed_locks
                        WHERE lock_name = name AND owner = 'agent:' || agent AND expires_at > clock_timestamp()), '{}') || about;
    SELECT l.outcome, to_jsonb(l) - '{outcome, waiting}'::text[] INTO outcome, held
      FROM acquire_lock(name, 'agent:' || agent, instance, ttl, about, false) AS l;
    IF outcome = 'promised' THEN
        held := NULL;
    END IF;
END $$;

-- Ends the agent's lock, if it has it. True also when the proxy repeats the request that ended it (see acting_as): a lock that
-- the agent has taken since stays, and a grant that the request presents may have been the one that ended.
CREATE OR REPLACE FUNCTION release_file_lock(name text, agent text, fences jsonb) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    token bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(name, 0));
    IF EXISTS (SELECT 1 FROM grants WHERE lock_name = name AND owner = 'agent:' || agent AND ended_how = 'released'
                  AND proxy_request_id = NULLIF(current_setting('loom.proxy_request_id', true), '')) THEN
        RETURN true;
    END IF;
    PERFORM enter_names('{}', fences);
    SELECT fencing_token INTO token FROM distributed_locks WHERE lock_name = name AND owner = 'agent:' || agent;
    RETURN release_lock(name, token, 'released', NULL);
END $$;


-- Idempotency keys ------------------------------------------------------------------------------------------------

-- One row per answered request that bore an Idempotency-Key, kept for a day. Written by loom.state.idempotency, in the
-- transaction of what the request did. The primary key is the promise: it is applied once. `scope` is a hash of key,
-- method, path and caller, which stand beside it for people; `fingerprint` one of all else that the request says.
CREATE TABLE IF NOT EXISTS idempotency_keys (
    scope       uuid        PRIMARY KEY,
    key         text        COLLATE "C" NOT NULL,
    method      text        COLLATE "C" NOT NULL,
    path        text        COLLATE "C" NOT NULL,
    caller      text        COLLATE "C" NOT NULL,
    fingerprint bytea       NOT NULL,
    status      integer     NOT NULL,
    headers     jsonb       NOT NULL,
    body        bytea       NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS idempotency_keys_created_at ON idempotency_keys (created_at);

-- The answer that a request with this scope got, if there is one. Its twins cannot look until our transaction ends: one
-- in flight is waited for with `wait`, else told. The lock first, then a look with a new snapshot: in one statement the
-- look would miss an answer that was committed in between.
CREATE OR REPLACE FUNCTION find_answer(wanted uuid, wait boolean)
RETURNS TABLE (in_progress boolean, fingerprint bytea, status integer, headers jsonb, body bytea)
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtextextended(wanted::text, 0)) THEN
        IF NOT wait THEN
            RETURN QUERY SELECT true, NULL::bytea, NULL::integer, NULL::jsonb, NULL::bytea;
            RETURN;
        END IF;
        PERFORM pg_advisory_xact_lock(hashtextextended(wanted::text, 0));
    END IF;
    RETURN QUERY SELECT false, k.fingerprint, k.status, k.headers, k.body FROM idempotency_keys k WHERE k.scope = wanted;
END $$;
