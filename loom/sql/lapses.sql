-- What the clock changes: leases that nobody has extended end, and so do delays.

-- Reopens a bead whose claim is over, unless that would have to wait for a lock: of the bead's name, of its agent's
-- row, of the row of a file lock. Returns null, or why the bead was not reopened. An error is such a reason, too, and
-- does not affect other beads. The caller has locked the bead's row.
CREATE OR REPLACE FUNCTION try_to_reopen(b beads, how text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    IF NOT try_name('bead:' || b.id) THEN
        RETURN 'its lock is held';
    END IF;
    PERFORM 1 FROM agents WHERE id = b.assigned_to FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND AND EXISTS (SELECT 1 FROM agents WHERE id = b.assigned_to) THEN
        RETURN 'the row of its agent is locked';
    ELSIF (SELECT count(*) FROM file_locks_of(b.id)) > (SELECT count(*) FROM (
            SELECT 1 FROM distributed_locks WHERE lock_name IN (SELECT lock_name FROM file_locks_of(b.id))
               FOR NO KEY UPDATE SKIP LOCKED) AS locked) THEN
        RETURN 'the row of a file lock is locked';
    END IF;
    PERFORM reopen_bead(b, how);
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    RETURN SQLERRM;
END $$;

-- Reopens beads whose leases nobody has renewed in time, at most `batch`. Examines up to 20 times as many, and returns
-- each one that it examined; problem: why that bead was not reopened. Skips locked rows, which includes claims that
-- fence a running transaction.
CREATE OR REPLACE FUNCTION lapse_claims(batch integer, OUT bead_id text, OUT agent_id text, OUT problem text)
RETURNS SETOF record LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp(); -- the function is volatile: PostgreSQL would not use an index
    done integer := 0;
    b beads;
BEGIN
    -- More than the batch: beads that cannot be reopened now must not hide the others.
    FOR b IN SELECT * FROM beads WHERE status = 'in_progress' AND wakes_at(not_before, lease_expires_at) <= t
              ORDER BY status, wakes_at(not_before, lease_expires_at) LIMIT 20 * batch FOR UPDATE SKIP LOCKED
    LOOP
        bead_id := b.id;
        agent_id := b.assigned_to;
        problem := try_to_reopen(b, 'lapsed');
        done := done + (problem IS NULL)::int;
        RETURN NEXT;
        EXIT WHEN done = batch;
    END LOOP;
END $$;

-- Clears not_before of open beads whose delay has ended, at most `batch`; returns how many. The UPDATE must not name
-- status: then the trigger entity_updated would fire, and add a version and an event.
CREATE OR REPLACE FUNCTION end_delays(batch integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp();
    n integer;
BEGIN
    -- An array: for a subquery of unknown length the planner may choose to read all beads.
    UPDATE beads SET not_before = NULL WHERE id = ANY (ARRAY(
        SELECT id FROM beads WHERE status = 'open' AND wakes_at(not_before, lease_expires_at) <= t
         ORDER BY status, wakes_at(not_before, lease_expires_at) LIMIT batch FOR NO KEY UPDATE SKIP LOCKED));
    GET DIAGNOSTICS n = ROW_COUNT;
    RETURN n;
END $$;

-- Opens deferred beads whose not_before has passed, at most `batch`: with a version and an event. Returns how many.
CREATE OR REPLACE FUNCTION open_deferred(batch integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp();
    n integer;
BEGIN
    UPDATE beads SET status = 'open', not_before = NULL WHERE id = ANY (ARRAY(
        SELECT id FROM beads WHERE status = 'deferred' AND wakes_at(not_before, lease_expires_at) <= t
         ORDER BY status, wakes_at(not_before, lease_expires_at) LIMIT batch FOR NO KEY UPDATE SKIP LOCKED));
    GET DIAGNOSTICS n = ROW_COUNT;
    RETURN n;
END $$;

-- Before a claim: reopens beads whose lease has ended, and makes those ready whose delay has ended.
CREATE OR REPLACE FUNCTION wake_beads(agent text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp();
BEGIN
    -- The first one, which the index answers: for EXISTS the planner may choose to read all beads.
    IF (SELECT status FROM beads
         WHERE status IN ('deferred', 'in_progress', 'open') AND wakes_at(not_before, lease_expires_at) <= t
         ORDER BY status, wakes_at(not_before, lease_expires_at) LIMIT 1) IS NOT NULL THEN
        -- The agent's row is locked now: lock beads and other agents only with SKIP LOCKED.
        PERFORM 1 FROM agents WHERE id = agent FOR NO KEY UPDATE;
        PERFORM lapse_claims(50);
        PERFORM end_delays(20);
        PERFORM open_deferred(20);
    END IF;
END $$;
