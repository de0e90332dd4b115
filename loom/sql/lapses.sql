-- What the clock changes: leases that nobody has extended end, and delays are over.

-- Reopens a bead whose claim is over, unless it would have to wait: for the bead's name, its agent's row, a file lock.
-- Answers null, or why it is not done. An error of this bead does not affect the others. The caller has locked its row.
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

-- Reopens beads whose leases nobody has renewed in time, at most `batch`. Skips locked rows, which includes claims that
-- fence a running transaction, and beads whose names are held from outside. problem: why a bead was not reopened.
CREATE OR REPLACE FUNCTION lapse_claims(batch integer, OUT bead_id text, OUT agent_id text, OUT problem text)
RETURNS SETOF record LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp(); -- a variable can be looked up in an index, the function cannot
    done integer := 0;
    b beads;
BEGIN
    -- Beyond the batch, too: those that cannot be reopened now must not hide the others.
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

-- Opens beads whose delay is over, at most `batch`; returns how many.
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

-- Opens deferred beads whose time has come, at most `batch`; each gets a version and an event.
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

-- Opens what the clock has opened, before a claim: beads whose lease or delay is over.
CREATE OR REPLACE FUNCTION wake_beads(agent text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp();
BEGIN
    -- The first one, which the index answers: for EXISTS the planner may choose to read all beads.
    IF (SELECT status FROM beads
         WHERE status IN ('deferred', 'in_progress', 'open') AND wakes_at(not_before, lease_expires_at) <= t
         ORDER BY status, wakes_at(not_before, lease_expires_at) LIMIT 1) IS NOT NULL THEN
        PERFORM 1 FROM agents WHERE id = agent FOR NO KEY UPDATE; -- first our own agent's: the others are only tried
        PERFORM lapse_claims(50);
        PERFORM end_delays(20);
        PERFORM open_deferred(20);
    END IF;
END $$;
