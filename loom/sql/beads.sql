-- Beads: dependencies, and what follows from a change of a bead.

-- Adds dependencies between existing beads in one transaction at a time: two could close a cycle together. Taken after
-- names and before rows. Closing a bead does not take it: the locks of the two rows keep the counters right.
CREATE OR REPLACE FUNCTION lock_bead_graph() RETURNS void LANGUAGE sql AS $$
    SELECT pg_advisory_xact_lock(own_locks(), 2);
$$;

-- The beads whose blocked_by or parent names this one.
CREATE OR REPLACE FUNCTION neighbours_of(bead text) RETURNS SETOF text LANGUAGE sql STABLE AS $$
    SELECT bead_id FROM bead_blockers WHERE blocker_id = bead UNION SELECT id FROM beads WHERE parent = bead;
$$;

-- Locks the rows that a change of a bead will touch, in id order: its own, its parent's, `others`, and with
-- `neighbours` those of the beads that name it. In any other order, it could deadlock with, for example, a heartbeat.
CREATE OR REPLACE FUNCTION lock_beads(bead text, others text[], neighbours boolean) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    late text[];
BEGIN
    others := others || bead || ARRAY(SELECT parent FROM beads WHERE id = bead AND parent IS NOT NULL);
    IF neighbours THEN
        others := others || ARRAY(SELECT neighbours_of(bead));
    END IF;
    PERFORM 1 FROM beads WHERE id = ANY (others) ORDER BY id FOR NO KEY UPDATE;
    IF neighbours THEN
        -- Some may have come while the row was not locked; no more can come. They are out of order, so it only tries.
        late := ARRAY(SELECT neighbours_of(bead) EXCEPT SELECT unnest(others));
        IF (SELECT count(*) FROM (SELECT 1 FROM beads WHERE id = ANY (late) FOR NO KEY UPDATE SKIP LOCKED) AS locked)
           < cardinality(late) THEN
            RAISE EXCEPTION 'a bead that names % is being changed', bead USING ERRCODE = '40001'; -- it is tried again
        END IF;
    END IF;
END $$;

-- Enters a change of a bead: enter_change(), then the graph and the rows of other beads. Each of blocked_by, parent,
-- blocks, children and new_status is what it will write of these, or null. links: whether it writes one of the first
-- four.
CREATE OR REPLACE FUNCTION enter_bead(
    bead text, blocked_by text[], new_parent text, blocks text[], children text[], links boolean, new_status text,
    agent text, deletes boolean, fences jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    was beads;
    closes_or_reopens boolean;
    neighbours text[] := '{}'; -- those whose blocked_by or parent changes
    blockers text[]; -- those that it comes to wait for
    dependants text[]; -- those that come to wait for it
BEGIN
    IF deletes THEN
        neighbours := ARRAY(SELECT neighbours_of(bead) LIMIT bound('names'));
    ELSIF links THEN
        neighbours := difference(blocks, ARRAY(SELECT bead_id FROM bead_blockers WHERE blocker_id = bead))
            || difference(children, ARRAY(SELECT id FROM beads WHERE parent = bead));
        PERFORM refuse_many_beads(cardinality(neighbours));
    END IF;
    PERFORM enter_change(
        'bead', bead, ARRAY(SELECT 'bead:' || n FROM unnest(neighbours) AS n) || ('agent:' || agent_named(agent)),
        deletes, fences);
    IF entered() IS NULL THEN
        RETURN;
    END IF;
    SELECT * INTO was FROM beads WHERE id = bead;
    closes_or_reopens := (was.status = 'closed') <> (new_status = 'closed');
    IF links THEN
        blockers := ARRAY(SELECT unnest(blocked_by) EXCEPT SELECT unnest(was.blocked_by)
                          UNION SELECT n FROM unnest(neighbours) AS n WHERE n = ANY (children));
        dependants := ARRAY(SELECT n FROM unnest(neighbours) AS n WHERE n = ANY (blocks)
                            UNION SELECT new_parent WHERE new_parent <> COALESCE(was.parent, ''));
        -- A new bead can be part of a cycle only if it waits for one and another waits for it.
        IF blockers <> '{}' AND dependants <> '{}' OR was.id IS NOT NULL AND blockers || dependants <> '{}' THEN
            PERFORM lock_bead_graph();
        END IF;
        PERFORM set_config('loom.neighbours', neighbours::text, true), set_config('loom.cycles', 'later', true);
    END IF;
    IF links OR deletes OR closes_or_reopens THEN
        PERFORM lock_beads(
            bead, neighbours || blockers || dependants || ARRAY(
                SELECT parent FROM beads WHERE id = ANY (neighbours) AND id = ANY (children) AND parent <> bead),
            deletes OR closes_or_reopens);
    END IF;
END $$;

-- What is in one of the lists and not in the other; empty if `wanted` is null.
CREATE OR REPLACE FUNCTION difference(wanted text[], found text[]) RETURNS text[] LANGUAGE sql IMMUTABLE AS $$
    SELECT ARRAY(SELECT COALESCE(w, f) FROM unnest(wanted) AS w FULL JOIN unnest(found) AS f ON w = f
                  WHERE wanted IS NOT NULL AND (w IS NULL OR f IS NULL));
$$;

-- Raises L0007 when a request would change more beads, from their other end, than it may lock names.
CREATE OR REPLACE FUNCTION refuse_many_beads(n bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF n > bound('names') THEN
        RAISE EXCEPTION '% beads would change', n USING ERRCODE = 'L0007',
            DETAIL = jsonb_build_object('beads', n, 'most', bound('names'));
    END IF;
END $$;

CREATE OR REPLACE FUNCTION refuse_unknown_beads(field text, wanted text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM raise_unknown(field, w) FROM unnest(wanted) AS w
      WHERE NOT EXISTS (SELECT 1 FROM beads WHERE id = w) LIMIT 1;
END $$;

-- Raises L0009 when too many beads wait for one of these: to close it must stay possible in one transaction. The caller
-- has locked their rows, so that nobody else adds one.
CREATE OR REPLACE FUNCTION refuse_crowded(blockers text[], parents text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    most integer := bound('dependants');
    crowded text;
BEGIN
    SELECT b INTO crowded FROM unnest(blockers) AS b WHERE most < (
        SELECT count(*) FROM (SELECT 1 FROM bead_blockers WHERE blocker_id = b LIMIT most + 1) AS w);
    IF crowded IS NULL THEN
        SELECT p INTO crowded FROM unnest(parents) AS p WHERE most < (
            SELECT count(*) FROM (SELECT 1 FROM beads WHERE parent = p LIMIT most + 1) AS c);
    END IF;
    IF crowded IS NOT NULL THEN
        RAISE EXCEPTION 'more than % beads would name %', most, crowded USING ERRCODE = 'L0009',
            DETAIL = jsonb_build_object('bead_id', crowded, 'most', most);
    END IF;
END $$;

-- Ends a change that links beads: writes `blocks` and `children` of the entered bead where they are stored, in
-- blocked_by and parent of its neighbours, and checks the result. Does not change those that became neighbours after
-- their names were locked.
CREATE OR REPLACE FUNCTION link_bead(blocked_by text[], new_parent text, blocks text[], children text[]) RETURNS void
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    bead text := entered();
    neighbours text[];
BEGIN
    IF bead IS NULL THEN
        RETURN;
    END IF;
    neighbours := current_setting('loom.neighbours');
    IF neighbours <> '{}' THEN
        PERFORM refuse_unknown_beads('blocks', blocks), refuse_unknown_beads('children', children);
        UPDATE beads b SET blocked_by = CASE WHEN b.id = ANY (blocks) THEN b.blocked_by || bead
                                             ELSE array_remove(b.blocked_by, bead) END
         WHERE b.id = ANY (neighbours) AND (b.id = ANY (blocks)) <> (bead = ANY (b.blocked_by));
        UPDATE beads b SET parent = CASE WHEN b.id = ANY (children) THEN bead END
         WHERE b.id = ANY (neighbours) AND (b.id = ANY (children)) <> (b.parent IS NOT DISTINCT FROM bead);
    END IF;
    PERFORM set_config('loom.cycles', '', true);
    PERFORM refuse_crowded(blocked_by || bead, ARRAY[new_parent, bead]);
    PERFORM check_bead_cycles(ARRAY[bead]);
END $$;

-- The prefix of the project and the next number, of at least three digits.
CREATE OR REPLACE FUNCTION new_bead_id(project text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    prefix text := COALESCE((SELECT bead_prefix FROM projects WHERE id = project), 'bd');
    n bigint;
    made text;
BEGIN
    LOOP
        n := nextval('bead_numbers');
        made := prefix || '-' || CASE WHEN n < 1000 THEN to_char(n, 'FM000') ELSE n::text END;
        EXIT WHEN NOT EXISTS (SELECT 1 FROM beads WHERE id = made);
    END LOOP;
    RETURN made;
END $$;

-- The beads that wait for this one (up), or those that it waits for: by blocked_by, and a parent for its children.
CREATE OR REPLACE FUNCTION next_beads(bead text, up boolean) RETURNS SETOF text LANGUAGE sql STABLE AS $$
    SELECT bead_id FROM bead_blockers WHERE up AND blocker_id = bead
    UNION ALL SELECT COALESCE(parent, '') FROM beads WHERE up AND id = bead -- IS NOT NULL might use beads_parent
    UNION ALL SELECT unnest(blocked_by) FROM beads WHERE NOT up AND id = bead
    UNION ALL SELECT id FROM beads WHERE NOT up AND parent = bead;
$$;

-- Those that can be reached from a bead, the nearest first, at most so many; the bead itself only if it is in a cycle.
CREATE OR REPLACE FUNCTION reachable_beads(start text, up boolean, most integer) RETURNS text[]
LANGUAGE sql STABLE AS $$
    WITH RECURSIVE reached (id) AS (
        SELECT next_beads(start, up)
        UNION SELECT next.id FROM reached CROSS JOIN next_beads(reached.id, up) AS next (id))
    SELECT ARRAY(SELECT id FROM reached WHERE id <> '' LIMIT most);
$$;

-- Raises L0002 when one of the beads waits for itself through others. Each has just been linked, so a new cycle leads
-- through one of them. It looks in both directions, a little further each time, and ends with the one that ends first:
-- there is nothing to visit when nobody waits for the bead. Raises L0008 after bound('graph') visits.
CREATE OR REPLACE FUNCTION check_bead_cycles(starts text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    start text;
    left_over integer := bound('graph');
    most integer;
    up boolean;
    reached text[];
    came_from jsonb;
    cycle text[];
BEGIN
    FOREACH start IN ARRAY starts LOOP
        most := 100;
        up := true;
        LOOP
            reached := reachable_beads(start, up, LEAST(most, left_over) + 1);
            left_over := left_over - cardinality(reached);
            EXIT WHEN start = ANY (reached) OR (cardinality(reached) <= most AND left_over >= 0);
            IF left_over <= 0 THEN
                RAISE EXCEPTION 'to look for a cycle, more than % beads would be visited', bound('graph')
                    USING ERRCODE = 'L0008', DETAIL = jsonb_build_object('most', bound('graph'));
            END IF;
            most := CASE WHEN up THEN most ELSE most * 10 END;
            up := NOT up;
        END LOOP;
        CONTINUE WHEN start <> ALL (reached);
        -- The way back from each: the first bead that led to it, as its place in `reached`.
        reached := start || reached[:array_position(reached, start) - 1];
        SELECT jsonb_object_agg(id, n) INTO came_from FROM (
            SELECT next.id, min(n) AS n FROM unnest(reached) WITH ORDINALITY AS via (id, n)
             CROSS JOIN next_beads(via.id, up) AS next (id) GROUP BY next.id) AS first;
        cycle := ARRAY[start];
        LOOP
            cycle := cycle || reached[(came_from ->> cycle[cardinality(cycle)])::integer];
            EXIT WHEN cycle[cardinality(cycle)] = start;
        END LOOP;
        IF NOT up THEN
            cycle := ARRAY(SELECT id FROM unnest(cycle) WITH ORDINALITY AS c (id, n) ORDER BY n DESC);
        END IF;
        RAISE EXCEPTION 'beads would wait for each other: %', array_to_string(cycle, ' -> ')
            USING ERRCODE = 'L0002', DETAIL = jsonb_build_object('cycle', cycle);
    END LOOP;
END $$;

-- The same for a change by hand. The functions above set loom.cycles, and check when all is written: in between there
-- may be a cycle.
CREATE OR REPLACE FUNCTION check_linked_by_hand(bead text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('loom.cycles', true) = 'later' THEN
        RETURN;
    END IF;
    PERFORM lock_bead_graph();
    PERFORM check_bead_cycles(ARRAY[bead]);
END $$;

-- Instead of a CHECK, which would cost the functions for claims 4 % and find nothing.
CREATE OR REPLACE FUNCTION refuse_half_a_claim(b beads) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF num_nulls(b.fencing_token, b.claimed_at, b.lease_seconds, b.lease_expires_at) NOT IN (0, 4)
       OR (b.fencing_token IS NOT NULL AND (b.status <> 'in_progress' OR b.assigned_to IS NULL)) THEN
        RAISE EXCEPTION 'half a claim: to end one, change status or assigned_to' USING ERRCODE = '23514';
    END IF;
END $$;

-- What follows from a change that the functions for claims did not make: the claim ends, times and counters are set,
-- and references are checked. An UPDATE gets its version and event, as in on_entity_changed(). Raises L0005 for a bead
-- that would come into a closed project.
CREATE OR REPLACE FUNCTION on_bead_written() RETURNS trigger LANGUAGE plpgsql SET timezone = 'UTC' AS $$
DECLARE
    closed boolean;
    added text[];
BEGIN
    IF TG_OP = 'INSERT' OR NEW.project_id <> OLD.project_id OR (OLD.status = 'closed' AND NEW.status <> 'closed') THEN
        -- The foreign key takes this lock, too, but only after this trigger, and says nothing of the status.
        SELECT p.status = 'closed' INTO closed FROM projects p WHERE p.id = NEW.project_id FOR KEY SHARE;
        IF closed THEN
            RAISE EXCEPTION 'project % is closed', NEW.project_id
                USING ERRCODE = 'L0005', DETAIL = jsonb_build_object('project_id', NEW.project_id),
                      HINT = 'Reopen it: UPDATE projects SET status = ''reopened''.';
        END IF;
    END IF;
    IF NEW.assigned_to <> COALESCE(OLD.assigned_to, '') THEN
        PERFORM raise_unknown('assigned_to', NEW.assigned_to) WHERE agent_named(NEW.assigned_to) IS NULL;
        NEW.assigned_to := agent_named(NEW.assigned_to);
    END IF;
    IF TG_OP = 'UPDATE' AND OLD.fencing_token IS NOT NULL
       AND (NEW.status, NEW.assigned_to) IS DISTINCT FROM (OLD.status, OLD.assigned_to) THEN
        PERFORM 1 FROM beads WHERE id = OLD.id FOR UPDATE; -- waits for the transactions that the claim fences
        IF NEW.status = OLD.status THEN
            NEW.status := 'open';
        ELSIF NEW.status <> 'closed' AND NEW.assigned_to = OLD.assigned_to THEN
            NEW.assigned_to := NULL;
        END IF;
        IF OLD.lease_expires_at <= clock_timestamp() AND NEW.attempts = OLD.attempts THEN -- it had lapsed before
            NEW.attempts := NEW.attempts + 1;
        END IF;
        NEW.fencing_token := NULL;
        NEW.claimed_at := NULL;
        NEW.lease_seconds := NULL;
        NEW.lease_expires_at := NULL;
    END IF;
    IF TG_OP = 'INSERT' OR NEW.status <> OLD.status THEN
        NEW.closed_at := CASE WHEN NEW.status = 'closed' THEN COALESCE(NEW.closed_at, clock_timestamp()) END;
        IF TG_OP = 'UPDATE' AND NEW.not_before IS NOT DISTINCT FROM OLD.not_before THEN
            NEW.not_before := NULL;
        END IF;
        IF NEW.status <> 'closed' THEN
            NEW.close_reason := NULL;
        END IF;
        IF TG_OP = 'UPDATE' AND OLD.status = 'blocked' THEN
            NEW.blocked_reason := NULL;
            NEW.attempts := 0;
            NEW.failures := 0;
        END IF;
    END IF;
    IF NEW.status NOT IN ('open', 'deferred') THEN
        NEW.not_before := NULL; -- it would keep a lease from ending, see wakes_at()
    END IF;
    IF NEW.assigned_to IS NOT NULL
       AND (TG_OP = 'INSERT' OR NEW.assigned_to IS DISTINCT FROM OLD.assigned_to
            OR (OLD.status = 'closed' AND NEW.status <> 'closed')) THEN
        PERFORM 1 FROM agents WHERE id = NEW.assigned_to FOR KEY SHARE;
        IF NOT FOUND AND TG_OP = 'UPDATE' AND NEW.assigned_to = OLD.assigned_to THEN
            NEW.assigned_to := NULL; -- reopened, and who closed it is gone
        ELSIF NOT FOUND THEN
            PERFORM raise_unknown('assigned_to', NEW.assigned_to);
        END IF;
    END IF;
    IF NEW.blocked_by <> COALESCE(OLD.blocked_by, '{}') THEN
        NEW.blocked_by := ARRAY(
            SELECT b FROM unnest(NEW.blocked_by) WITH ORDINALITY AS u (b, n) GROUP BY b ORDER BY min(n));
        IF cardinality(NEW.blocked_by) > GREATEST(bound('references'), cardinality(OLD.blocked_by)) THEN
            RAISE EXCEPTION 'of bead % would have more than % beads', NEW.id, bound('references')
                USING ERRCODE = '23514', COLUMN = 'blocked_by';
        END IF;
        added := ARRAY(SELECT unnest(NEW.blocked_by) EXCEPT SELECT unnest(OLD.blocked_by));
        -- With their rows locked until this transaction ends, those that exist now will exist then, and none closes.
        SELECT NEW.open_blockers + count(*) FILTER (WHERE locked.status <> 'closed') INTO NEW.open_blockers
          FROM (SELECT status FROM beads WHERE id = ANY (added) AND id <> NEW.id
                 ORDER BY id FOR NO KEY UPDATE) AS locked;
        PERFORM refuse_unknown_beads('blocked_by', array_remove(added, NEW.id));
        -- One that is closing at this time does not count this bead any more: it counts once it has this bead's row.
        NEW.open_blockers := NEW.open_blockers - (
            SELECT count(*) FROM beads WHERE id = ANY (OLD.blocked_by) AND id <> ALL (NEW.blocked_by)
               AND status <> 'closed' AND id <> NEW.id);
    END IF;
    PERFORM refuse_half_a_claim(NEW);
    IF TG_OP = 'UPDATE' THEN
        NEW.version := OLD.version + 1;
        NEW.updated_at := clock_timestamp();
        PERFORM note_change(TG_ARGV[0], TG_OP, to_jsonb(OLD), to_jsonb(NEW), TG_ARGV[1]::text[]);
    END IF;
    RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS a_bead_inserted ON beads;
CREATE TRIGGER a_bead_inserted BEFORE INSERT ON beads FOR EACH ROW WHEN (NOT importing())
    EXECUTE FUNCTION on_bead_written();
DO $$
BEGIN
    -- One trigger for the rules of beads and for the event: each condition of a trigger takes 1.5 % of a claim.
    PERFORM create_entity_triggers('bead', 'beads', '{lease_seconds, lease_expires_at, claimed_at, not_before,
                                                      open_blockers, open_children}', 'on_bead_written');
END $$;

CREATE OR REPLACE FUNCTION on_bead_blockers_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM bead_blockers
     WHERE bead_id = NEW.id AND blocker_id = ANY (CASE WHEN TG_OP = 'UPDATE' THEN OLD.blocked_by END)
       AND blocker_id <> ALL (NEW.blocked_by);
    INSERT INTO bead_blockers (bead_id, blocker_id) SELECT NEW.id, unnest(NEW.blocked_by) ON CONFLICT DO NOTHING;
    IF EXISTS (SELECT unnest(NEW.blocked_by)
               EXCEPT SELECT unnest(CASE TG_OP WHEN 'UPDATE' THEN OLD.blocked_by END)) THEN
        PERFORM check_linked_by_hand(NEW.id);
    END IF;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS bead_inserted_with_blockers ON beads;
CREATE TRIGGER bead_inserted_with_blockers AFTER INSERT ON beads FOR EACH ROW
    WHEN (NEW.blocked_by <> '{}' AND NOT importing()) EXECUTE FUNCTION on_bead_blockers_changed();
DROP TRIGGER IF EXISTS bead_blockers_changed ON beads;
CREATE TRIGGER bead_blockers_changed AFTER UPDATE OF blocked_by ON beads FOR EACH ROW
    WHEN (NEW.blocked_by <> OLD.blocked_by) EXECUTE FUNCTION on_bead_blockers_changed();

-- Keeps the counters of the beads that wait for a bead when it is closed, reopened, moved or deleted, and notes the end
-- of its claim. One trigger for both, with a short condition: each UPDATE compiles the conditions of all triggers
-- again.
CREATE OR REPLACE FUNCTION on_bead_closed_or_reopened() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    me text := CASE TG_OP WHEN 'DELETE' THEN OLD.id ELSE NEW.id END;
    was_open boolean := TG_OP <> 'INSERT' AND OLD.status <> 'closed';
    is_open boolean := TG_OP <> 'DELETE' AND NEW.status <> 'closed';
    old_parent text := CASE WHEN was_open THEN OLD.parent END;
    new_parent text := CASE WHEN is_open THEN NEW.parent END;
    closes_or_reopens boolean := TG_OP = 'DELETE' OR (TG_OP = 'UPDATE' AND was_open <> is_open);
BEGIN
    IF TG_OP <> 'UPDATE' OR closes_or_reopens OR OLD.parent IS DISTINCT FROM NEW.parent THEN
        -- All rows first, in id order; then the UPDATEs: a bead that waited for this one may wait for another by now.
        PERFORM 1 FROM beads WHERE id IN (
            SELECT bead_id FROM bead_blockers WHERE closes_or_reopens AND blocker_id = me
            UNION ALL SELECT unnest(ARRAY[old_parent, new_parent]))
          ORDER BY id FOR NO KEY UPDATE;
        IF FOUND AND TG_OP = 'DELETE' THEN
            UPDATE beads SET blocked_by = array_remove(blocked_by, me), open_blockers = open_blockers - was_open::int
             WHERE id IN (SELECT bead_id FROM bead_blockers WHERE blocker_id = me);
        ELSIF FOUND AND closes_or_reopens THEN
            UPDATE beads SET open_blockers = open_blockers + CASE WHEN is_open THEN 1 ELSE -1 END
             WHERE id IN (SELECT bead_id FROM bead_blockers WHERE blocker_id = me);
        END IF;
        IF old_parent IS DISTINCT FROM new_parent THEN
            UPDATE beads SET open_children = open_children - 1 WHERE id = old_parent;
            UPDATE beads SET open_children = open_children + 1 WHERE id = new_parent;
        END IF;
        IF TG_OP = 'DELETE' THEN
            DELETE FROM bead_blockers WHERE blocker_id = ANY (OLD.blocked_by) AND bead_id = me;
        ELSIF NEW.parent IS NOT NULL
              AND (NEW.parent = me OR (TG_OP = 'UPDATE' AND NEW.parent IS DISTINCT FROM OLD.parent)) THEN
            PERFORM check_linked_by_hand(me);
        END IF;
    END IF;
    IF TG_OP <> 'INSERT' AND OLD.fencing_token <> COALESCE(CASE TG_OP WHEN 'UPDATE' THEN NEW.fencing_token END, 0) THEN
        PERFORM note_claim_ended(OLD, CASE
            WHEN TG_OP = 'UPDATE' AND NEW.attempts > OLD.attempts AND OLD.lease_expires_at <= clock_timestamp()
            THEN 'lapsed' ELSE 'changed' END);
    END IF;
    IF TG_OP = 'UPDATE' THEN
        PERFORM refuse_half_a_claim(NEW); -- on_bead_written() is not called for a column of the lease
    END IF;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS bead_inserted_with_parent ON beads;
CREATE TRIGGER bead_inserted_with_parent AFTER INSERT ON beads FOR EACH ROW
    WHEN (NEW.parent IS NOT NULL AND NOT importing()) EXECUTE FUNCTION on_bead_closed_or_reopened();
DROP TRIGGER IF EXISTS bead_closed_or_reopened ON beads;
CREATE TRIGGER bead_closed_or_reopened AFTER UPDATE ON beads FOR EACH ROW
    WHEN (OLD.fencing_token IS NOT NULL OR NEW.fencing_token IS NULL) -- not for a new claim
    EXECUTE FUNCTION on_bead_closed_or_reopened();
DROP TRIGGER IF EXISTS bead_deleted ON beads;
CREATE TRIGGER bead_deleted AFTER DELETE ON beads FOR EACH ROW EXECUTE FUNCTION on_bead_closed_or_reopened();

CREATE OR REPLACE FUNCTION open_children_of(bead text) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT to_jsonb(ARRAY(SELECT c.id FROM beads c WHERE c.parent = bead AND c.status <> 'closed' ORDER BY c.id));
$$;
