-- Locks: acquire, wait, renew, release, fence; the automatic locks of changes.

-- The key of a name's advisory lock. Before PostgreSQL 15, every role may create functions in the schema `public`, and
-- one that fits the types better than the catalogue's would be called: so 0 is a bigint, as the catalogue has it.
CREATE OR REPLACE FUNCTION name_key(name text) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT pg_catalog.hashtextextended(name, 0::bigint);
$$;

-- The first number of Loom's own advisory locks, "Loom" in ASCII. Keys of two numbers are another space than those of
-- one, so that no client can choose a name whose key is one of these. The second: 0, the schema (loom/db/schema.py);
-- 1, the numbering of events; 2, the graph of beads; 3, the shared values. own_locks() + 1: of idempotency keys, each
-- with the hash of its scope; two of one hash only wait for each other.
CREATE OR REPLACE FUNCTION own_locks() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 1282371437';

-- Writes the end of a grant into the history. release_lock() and end_grants() tell how it ended by settings of their
-- transaction. Without them, as after a deletion by hand, the end is 'expired' or, before expires_at, 'forced'.
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

-- A grant ends when its row is deleted, or when the next grant takes the row over. The notices are for loom/metrics.py.
CREATE OR REPLACE FUNCTION on_grant_ended() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM end_grant(OLD);
    IF TG_OP = 'UPDATE' THEN
        RAISE NOTICE 'loom: lock_taken_over';
    ELSIF OLD.expires_at <= clock_timestamp() THEN
        RAISE NOTICE 'loom: lock_expired';
    END IF;
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
CREATE TRIGGER locks_truncated BEFORE TRUNCATE ON distributed_locks FOR EACH STATEMENT
    EXECUTE FUNCTION on_locks_truncated();

-- Ends these grants, if they are still held. It does not wait for a transaction that a grant fences: that grant only
-- expires, and its lock is free once the transaction has ended.
CREATE OR REPLACE FUNCTION end_grants(wanted distributed_locks[], how text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF wanted = '{}' THEN
        RETURN;
    END IF;
    PERFORM set_config('loom.ended_how', how, true);
    DELETE FROM distributed_locks WHERE lock_name IN (
        SELECT l.lock_name FROM unnest(wanted) AS w
          JOIN distributed_locks l ON (l.lock_name, l.fencing_token) = (w.lock_name, w.fencing_token)
         WHERE l.expires_at > clock_timestamp() ORDER BY 1 FOR UPDATE OF l SKIP LOCKED);
    PERFORM set_config('loom.ended_how', '', true);
    UPDATE distributed_locks l SET expires_at = clock_timestamp() FROM unnest(wanted) AS w
     WHERE (l.lock_name, l.fencing_token) = (w.lock_name, w.fencing_token) AND l.expires_at > clock_timestamp();
END $$;

-- Takes the lock if it is free and no waiter comes before us. The order matters: lock the name, lock the row, read the
-- clock. outcome: 'new': a new grant; 'same': the grant that this owner already holds, extended; 'held': another
-- owner's grant, which is returned; 'promised': the lock is free, but a waiter comes first. A refused call does not
-- write to the row, nor wait for its lock.
CREATE OR REPLACE FUNCTION acquire_lock(
    name text, new_owner text, instance uuid, ttl interval, about jsonb, wait boolean)
RETURNS TABLE (outcome text, waiting bigint, lock_name text, instance_id uuid, owner text, fencing_token bigint,
               acquired_at timestamptz, expires_at timestamptz, heartbeat_at timestamptz, metadata jsonb)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    held distributed_locks;
    first text;
    t timestamptz;
BEGIN
    PERFORM pg_advisory_xact_lock(name_key(name));
    SELECT * INTO held FROM distributed_locks l WHERE l.lock_name = name;
    IF held.owner = new_owner THEN
        -- NO KEY UPDATE, as in a renewal: it does not wait for the transactions that this grant fences.
        SELECT * INTO held FROM distributed_locks l WHERE l.lock_name = name FOR NO KEY UPDATE;
    END IF;
    t := clock_timestamp();

    IF held.owner = new_owner AND held.expires_at > t THEN
        RETURN QUERY
            UPDATE distributed_locks AS l
               SET expires_at = GREATEST(l.expires_at, t + ttl), heartbeat_at = t,
                   metadata = COALESCE(about, l.metadata)
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
        -- A place that has lapsed is lost: its owner gets a new one at the end of the queue.
        INSERT INTO lock_waiters AS w (lock_name, owner, asked_at) VALUES (name, new_owner, t)
            ON CONFLICT ON CONSTRAINT lock_waiters_pkey DO UPDATE
               SET asked_at = t,
                   place = CASE WHEN keeps_place(w.asked_at, t) THEN w.place ELSE excluded.place END;
    END IF;
    SELECT count(*) INTO waiting FROM lock_waiters w WHERE w.lock_name = name AND keeps_place(w.asked_at, t);
    RETURN QUERY SELECT outcome, waiting, held.*;
END $$;

-- One poll for all requests that wait in one worker: keeps their places, and returns the first waiter of each of these
-- names whose lock is free, also when it waits in another worker. It grants nothing and does not wait for row locks:
-- each of these requests then calls acquire_lock(). A lock that has expired is not free while a transaction that it
-- fences is still running.
CREATE OR REPLACE FUNCTION poll_waiters(names text[], owners text[]) RETURNS TABLE (lock_name text, owner text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    t timestamptz := clock_timestamp();
BEGIN
    -- A place is updated at most every half second. One owner may wait in two requests.
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

-- Extends or, without `extend`, also shortens a grant; never inserts one, never revives one that has ended. The order
-- matters: lock the name, lock the row, read the clock. An UPDATE that waits for the row after it has read the clock
-- would revive a lock that ended during the wait.
CREATE OR REPLACE FUNCTION renew_lock(name text, token bigint, ttl interval, extend boolean)
RETURNS SETOF distributed_locks
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(name_key(name));
    PERFORM 1 FROM distributed_locks WHERE lock_name = name FOR NO KEY UPDATE;
    RETURN QUERY
        UPDATE distributed_locks
           SET expires_at = GREATEST(CASE WHEN extend THEN expires_at END, clock_timestamp() + ttl),
               heartbeat_at = clock_timestamp()
         WHERE lock_name = name AND fencing_token = token AND expires_at > clock_timestamp()
        RETURNING *;
END $$;

-- Ends a grant that is still held; false if it is not. how: 'released' by its holder, or 'forced' by an operator.
-- Raises 55P03 (lock_not_available) while a transaction that the grant fences is running.
CREATE OR REPLACE FUNCTION release_lock(name text, token bigint, how text, why text) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    done boolean;
BEGIN
    PERFORM pg_advisory_xact_lock(name_key(name));
    PERFORM 1 FROM distributed_locks WHERE lock_name = name FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        -- Waits for another change of the row, but not for a transaction that the grant fences: others want the name.
        PERFORM 1 FROM distributed_locks WHERE lock_name = name FOR NO KEY UPDATE;
        PERFORM 1 FROM distributed_locks WHERE lock_name = name FOR UPDATE NOWAIT;
    END IF;
    PERFORM set_config('loom.ended_how', how, true), set_config('loom.reason', COALESCE(why, ''), true);
    DELETE FROM distributed_locks
     WHERE lock_name = name AND fencing_token = token AND expires_at > clock_timestamp();
    done := FOUND;
    PERFORM set_config('loom.ended_how', '', true), set_config('loom.reason', '', true);
    RETURN done;
END $$;

-- Fences a write: call it in the write's own transaction. Raises L0001 (lock-lost) unless the grant is held now, and
-- keeps its row locked until commit, so that no later grant can be made before this transaction ends. For 'bead:ID',
-- the token of a claim does as well: then the bead's row is locked. Locks and claims draw their tokens from one
-- sequence.
CREATE OR REPLACE FUNCTION loom_fence(name text, token bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    ends timestamptz;
BEGIN
    IF current_setting('transaction_isolation') = 'read committed' THEN
        -- A new grant and a deletion of the row wait for this; renewals by the holder do not.
        SELECT expires_at INTO ends FROM distributed_locks
         WHERE lock_name = name AND fencing_token = token FOR KEY SHARE;
        IF ends IS NULL AND name LIKE 'bead:%' THEN
            SELECT lease_expires_at INTO ends FROM beads
             WHERE id = substr(name, 6) AND fencing_token = token FOR KEY SHARE;
        END IF;
    ELSE
        -- An older snapshot must not hide a changed end: after a renewal this raises 40001, and the caller tries again.
        SELECT expires_at INTO ends FROM distributed_locks WHERE lock_name = name AND fencing_token = token FOR SHARE;
        IF ends IS NULL AND name LIKE 'bead:%' THEN
            SELECT lease_expires_at INTO ends FROM beads WHERE id = substr(name, 6) AND fencing_token = token FOR SHARE;
        END IF;
    END IF;
    IF ends IS NULL OR ends <= clock_timestamp() THEN
        RAISE EXCEPTION 'lock % is not held with fencing token %', name, token USING ERRCODE = 'L0001',
            DETAIL = jsonb_build_object('lock_name', name, 'fencing_token', token);
    END IF;
END $$;

-- Raises L0003 (lock-held) when one of the names is held from outside, and no fence presents its token.
CREATE OR REPLACE FUNCTION refuse_held(names text[], fences jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    held distributed_locks;
BEGIN
    SELECT * INTO held FROM distributed_locks l
     WHERE l.lock_name = ANY (names) AND l.expires_at > clock_timestamp()
       AND (fences ->> l.lock_name)::bigint IS DISTINCT FROM l.fencing_token LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'lock % is held by %', held.lock_name, held.owner USING ERRCODE = 'L0003',
            DETAIL = json_build_object('lock_name', held.lock_name, 'holder', json_build_object(
                -- without the token, which only the holder may know
                'lock_name', held.lock_name, 'owner', held.owner, 'instance_id', held.instance_id,
                'acquired_at', held.acquired_at, 'expires_at', held.expires_at, 'heartbeat_at', held.heartbeat_at,
                'metadata', held.metadata));
    END IF;
END $$;

-- Begins a change: locks the names of the entities that it changes, in order, and fences it with the request's grants.
-- Raises L0003 (lock-held) and L0001 (lock-lost).
CREATE OR REPLACE FUNCTION enter_names(names text[], fences jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    name text;
BEGIN
    IF cardinality(names) > 1 THEN
        names := ARRAY(SELECT DISTINCT n COLLATE "C" FROM unnest(names) AS n WHERE n IS NOT NULL ORDER BY 1);
    END IF;
    FOREACH name IN ARRAY names LOOP
        PERFORM pg_advisory_xact_lock(name_key(name));
    END LOOP;
    IF fences IS NOT NULL THEN
        PERFORM loom_fence(f.key, f.value::bigint)
           FROM (SELECT * FROM jsonb_each_text(fences) ORDER BY key COLLATE "C") AS f;
    END IF;
    -- A new statement: one that began before a name was locked would miss a grant made in between.
    IF names <> '{}' THEN
        PERFORM refuse_held(names, fences);
    END IF;
END $$;

-- Tries to lock a name, for a caller that has already locked rows and so must not wait. False if another transaction
-- has locked the name, or a grant holds it. The two are separate statements, since one would miss a grant made in
-- between.
CREATE OR REPLACE FUNCTION try_name(name text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(name_key(name)) THEN
        RETURN false;
    END IF;
    RETURN NOT EXISTS (SELECT 1 FROM distributed_locks l WHERE l.lock_name = name AND l.expires_at > clock_timestamp());
END $$;
