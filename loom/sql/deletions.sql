-- Deletions that touch many rows: in steps that each commit.
--
-- A transaction that locks thousands of names fills PostgreSQL's shared lock table (max_locks_per_transaction), and one
-- that changes very many rows does not end in time. So what is too large is refused with 'in-steps' to delete() in
-- loom/state/entities.py, which then calls clear_step(), through _clear(), until nothing is left, and tries again.

-- How many comments, or file locks, one step removes at most.
CREATE OR REPLACE FUNCTION step_rows() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 1000';

-- The comments that one step deletes: the newest first, so that replies go before what they reply to.
CREATE OR REPLACE FUNCTION comments_batch(kind text, key text) RETURNS SETOF comments LANGUAGE sql STABLE AS $$
    SELECT * FROM comments WHERE entity_type = kind AND entity_id = key ORDER BY created_at DESC, id DESC
     LIMIT step_rows();
$$;

-- The agents that name a project or a provider.
CREATE OR REPLACE FUNCTION agents_of(kind text, key text) RETURNS SETOF text LANGUAGE sql STABLE AS $$
    SELECT id FROM agents WHERE kind = 'project' AND project_id = key
    UNION ALL SELECT id FROM agents WHERE kind = 'provider' AND provider_id = key;
$$;

-- The beads that an agent has or that are reserved for it.
CREATE OR REPLACE FUNCTION beads_of(agent text) RETURNS SETOF text LANGUAGE sql STABLE AS $$
    SELECT id FROM beads WHERE assigned_to = agent AND status IN ('open', 'in_progress', 'blocked', 'deferred');
$$;

-- The beads that name one of these, in blocked_by or parent, and are not among them.
CREATE OR REPLACE FUNCTION outside_neighbours(keys text[]) RETURNS SETOF text LANGUAGE sql STABLE AS $$
    SELECT n.id FROM unnest(keys) AS k (id) CROSS JOIN neighbours_of(k.id) AS n (id) EXCEPT SELECT unnest(keys);
$$;

-- The file locks of an agent that one step ends.
CREATE OR REPLACE FUNCTION file_locks_batch(agent text) RETURNS SETOF distributed_locks LANGUAGE sql STABLE AS $$
    SELECT * FROM distributed_locks
     WHERE owner = 'agent:' || agent AND lock_name LIKE 'file:%' AND expires_at > clock_timestamp()
     LIMIT step_rows();
$$;

-- Whether an entity must be deleted in steps. A project with a bead or an agent always must.
CREATE OR REPLACE FUNCTION needs_steps(kind text, key text) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT CASE kind
        WHEN 'bead' THEN (SELECT count(*) FROM (SELECT neighbours_of(key) LIMIT bound('names')) AS n) = bound('names')
        WHEN 'agent' THEN (SELECT count(*) FROM (SELECT beads_of(key) LIMIT bound('names')) AS b) = bound('names')
            OR (SELECT count(*) FROM file_locks_batch(key)) = step_rows()
        WHEN 'project' THEN EXISTS (SELECT 1 FROM beads WHERE project_id = key) OR EXISTS (SELECT agents_of(kind, key))
        WHEN 'provider' THEN
            (SELECT count(*) FROM (SELECT agents_of(kind, key) LIMIT bound('names')) AS a) = bound('names')
        ELSE false END
        OR (SELECT count(*) FROM comments_batch(kind, key)) = step_rows();
$$;

-- Unlinks beads from those that will be deleted. The caller has locked the names and the rows.
CREATE OR REPLACE FUNCTION unlink_beads(from_beads text[], keys text[]) RETURNS void LANGUAGE sql AS $$
    UPDATE beads SET blocked_by = ARRAY(SELECT b FROM unnest(blocked_by) WITH ORDINALITY AS u (b, n)
                                         WHERE b <> ALL (from_beads) ORDER BY n)
     WHERE id = ANY (keys) AND blocked_by && from_beads;
    UPDATE beads SET parent = NULL WHERE id = ANY (keys) AND parent = ANY (from_beads);
$$;

-- One step of a deletion; returns how many beads, agents, comments and file locks are left. Raises L0010 for a project
-- with a bead in progress.
CREATE OR REPLACE FUNCTION clear_step(kind text, key text, fences jsonb) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    batch_size integer := bound('names') / 2; -- one step locks the names of beads and of others
    beads_now text[];
    others text[] := '{}';
    agents_now text[];
    busy text;
    removed integer;
BEGIN
    IF kind = 'project' THEN
        SELECT id INTO busy FROM beads WHERE project_id = key AND status = 'in_progress' ORDER BY id LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'bead % is in progress', busy USING ERRCODE = 'L0010',
                DETAIL = jsonb_build_object('used_by', 'beads', 'bead_id', busy);
        ELSIF EXISTS (SELECT 1 FROM projects WHERE parent_id = key) THEN
            RAISE EXCEPTION 'other projects refer to %', key
                USING ERRCODE = 'L0010', DETAIL = '{"used_by": "projects"}';
        END IF;
        beads_now := ARRAY(SELECT id FROM beads WHERE project_id = key ORDER BY status, id LIMIT batch_size);
        others := ARRAY(SELECT outside_neighbours(beads_now) LIMIT batch_size);
    ELSIF kind = 'agent' THEN
        beads_now := ARRAY(SELECT beads_of(key) LIMIT bound('names'));
    ELSIF kind = 'bead' THEN
        others := ARRAY(SELECT neighbours_of(key) LIMIT bound('names'));
    END IF;
    agents_now := ARRAY(SELECT agents_of(kind, key) ORDER BY 1 LIMIT batch_size);
    PERFORM enter_names(
        ARRAY(SELECT 'bead:' || n FROM unnest(beads_now || others) AS n)
            || ARRAY(SELECT 'agent:' || n FROM unnest(agents_now) AS n) || (kind || ':' || key), fences);
    PERFORM lock_beads(CASE kind WHEN 'bead' THEN key END, beads_now || others || ARRAY(
        SELECT parent FROM beads WHERE id = ANY (beads_now || others) AND parent IS NOT NULL), false);
    DELETE FROM comments WHERE id IN (
        SELECT c.id FROM comments_batch(kind, key) AS c
        UNION ALL SELECT c.id FROM unnest(beads_now) AS of_bead CROSS JOIN comments_batch('bead', of_bead) AS c
         WHERE kind = 'project' LIMIT step_rows());
    GET DIAGNOSTICS removed = ROW_COUNT;
    IF kind = 'agent' THEN
        PERFORM reopen_bead(x, how_ended(x)) FROM beads x
          WHERE id = ANY (beads_now) AND assigned_to = key AND fencing_token IS NOT NULL;
        UPDATE beads SET assigned_to = NULL WHERE id = ANY (beads_now) AND assigned_to = key AND status <> 'closed';
        PERFORM end_grants(ARRAY(SELECT file_locks_batch(key)), 'released');
        RETURN (SELECT count(*) FROM beads_of(key)) + (SELECT count(*) FROM file_locks_batch(key));
    END IF;
    PERFORM unlink_beads(beads_now || key, others);
    IF kind = 'project' AND cardinality(others) < batch_size AND removed < step_rows() THEN
        -- A bead that was claimed, or named by another bead, before its row was locked is left for the next step.
        DELETE FROM beads WHERE id = ANY (beads_now) AND project_id = key AND status <> 'in_progress'
           AND NOT EXISTS (SELECT 1 FROM neighbours_of(id) AS n (id) WHERE n.id <> ALL (beads_now));
    END IF;
    PERFORM 1 FROM agents WHERE id = ANY (agents_now) ORDER BY id FOR NO KEY UPDATE;
    UPDATE agents SET project_id = NULL WHERE kind = 'project' AND id = ANY (agents_now) AND project_id = key;
    UPDATE agents SET provider_id = NULL WHERE kind = 'provider' AND id = ANY (agents_now) AND provider_id = key;
    RETURN CASE kind WHEN 'bead' THEN (SELECT count(*) FROM neighbours_of(key))
                     WHEN 'project' THEN (SELECT count(*) FROM beads WHERE project_id = key) ELSE 0 END
        + (SELECT count(*) FROM agents_of(kind, key)) + (SELECT count(*) FROM comments_batch(kind, key));
END $$;
