-- Beads: dependencies, and what follows from a change of a bead.

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

-- Locks every other row that a change of a bead will touch, in id order: `others`, what they wait for, its parent and,
-- when it closes or reopens, the beads that wait for it. Without this, the change could deadlock with a transaction
-- that has one of those rows and waits for the bead's own, such as a heartbeat.
CREATE OR REPLACE FUNCTION lock_beads(bead text, others text[], closes_or_reopens boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    above text := (SELECT parent FROM beads WHERE id = bead);
BEGIN
    -- Step by step: one statement for all took 270 us more, most of it planning.
    IF others <> '{}' THEN
        others := others || ARRAY(SELECT unnest(b.blocked_by || b.parent) FROM beads b WHERE b.id = ANY (others));
    END IF;
    IF closes_or_reopens THEN
        others := others || ARRAY(SELECT bead_id FROM bead_blockers WHERE blocker_id = bead);
    END IF;
    IF above IS NOT NULL THEN
        others := others || above;
    END IF;
    IF others <> '{}' THEN
        PERFORM 1 FROM beads WHERE id = ANY (others || bead) ORDER BY id FOR NO KEY UPDATE;
    END IF;
END $$;

-- Enters a change of a bead: enter_change(), then the lock of the graph and the rows of other beads. blocks, children:
-- what it will write of these, or null. others: beads that it will refer to. links: whether it changes dependencies.
CREATE OR REPLACE FUNCTION enter_bead(
    bead text, blocks text[], children text[], others text[], links boolean, new_status text, agent text,
    deletes boolean, fences jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    neighbours text[] := '{}'; -- whose blocked_by or parent may change
    closes_or_reopens boolean;
BEGIN
    IF blocks IS NOT NULL THEN
        neighbours := blocks || ARRAY(SELECT bead_id FROM bead_blockers WHERE blocker_id = bead);
    END IF;
    IF children IS NOT NULL THEN
        neighbours := neighbours || children || ARRAY(SELECT id FROM beads WHERE parent = bead);
    END IF;
    PERFORM enter_change(
        'bead', bead, ARRAY(SELECT 'bead:' || n FROM unnest(neighbours) AS n) || ('agent:' || agent), deletes, fences);
    IF entered() IS NULL OR NOT (links OR new_status IS NOT NULL) THEN
        RETURN;
    END IF;
    PERFORM lock_bead_graph(links);
    closes_or_reopens := (SELECT (b.status = 'closed') <> (new_status = 'closed') FROM beads b WHERE b.id = bead);
    IF links OR closes_or_reopens THEN
        PERFORM lock_beads(bead, neighbours || others, closes_or_reopens);
    END IF;
    -- Until link_neighbours(), which checks when all is written.
    PERFORM set_config('loom.neighbours', neighbours::text, true),
            set_config('loom.cycles', CASE WHEN neighbours <> '{}' AND NOT deletes THEN 'later' ELSE '' END, true);
END $$;

CREATE OR REPLACE FUNCTION refuse_unknown_beads(field text, wanted text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM raise_unknown(field, w) FROM unnest(wanted) AS w
      WHERE NOT EXISTS (SELECT 1 FROM beads WHERE id = w) LIMIT 1;
END $$;

-- Writes `blocks` and `children` of the entered bead where they stand: in blocked_by and parent of its neighbours.
-- Leaves those that became neighbours after their names were locked.
CREATE OR REPLACE FUNCTION link_neighbours(blocks text[], children text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    bead text := entered();
    neighbours text[];
BEGIN
    IF bead IS NULL THEN
        RETURN;
    END IF;
    neighbours := current_setting('loom.neighbours');
    PERFORM refuse_unknown_beads('blocks', blocks), refuse_unknown_beads('children', children);
    UPDATE beads SET blocked_by = blocked_by || bead WHERE id = ANY (blocks) AND bead <> ALL (blocked_by);
    UPDATE beads SET blocked_by = array_remove(blocked_by, bead)
     WHERE id = ANY (neighbours) AND id <> ALL (blocks) AND bead = ANY (blocked_by);
    UPDATE beads SET parent = bead WHERE id = ANY (children) AND parent IS DISTINCT FROM bead;
    UPDATE beads SET parent = NULL WHERE id = ANY (neighbours) AND id <> ALL (children) AND parent = bead;
    PERFORM set_config('loom.cycles', '', true);
    PERFORM check_bead_cycle(bead);
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

-- Raises L0002 when the bead waits for itself: for its blockers and its children, for theirs, and so on. Only one that
-- has just come to wait for others can have closed a cycle, so every way back from it leads to it. Who changes several
-- beads sets loom.cycles to 'later', and looks when all is done: in between there may be a cycle.
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
            USING ERRCODE = 'L0002', DETAIL = jsonb_build_object('cycle', cycle);
    END IF;
END $$;

-- What follows from a change that the functions for claims did not make: the claim ends, times and counters are set,
-- and references are checked. Raises L0005 for a bead that would come into a closed project.
CREATE OR REPLACE FUNCTION on_bead_written() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    closed boolean;
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
    IF TG_OP = 'UPDATE' AND OLD.fencing_token IS NOT NULL
       AND (NEW.status, NEW.assigned_to) IS DISTINCT FROM (OLD.status, OLD.assigned_to) THEN
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
        PERFORM lock_bead_graph(true);
        NEW.blocked_by := ARRAY(
            SELECT b FROM unnest(NEW.blocked_by) WITH ORDINALITY AS u (b, n) GROUP BY b ORDER BY min(n));
        IF cardinality(NEW.blocked_by) > GREATEST(bound('references'), cardinality(OLD.blocked_by)) THEN
            RAISE EXCEPTION 'of bead % would have more than % beads', NEW.id, bound('references')
                USING ERRCODE = '23514', COLUMN = 'blocked_by';
        END IF;
        SELECT count(*) FILTER (WHERE locked.status <> 'closed') INTO NEW.open_blockers
          FROM (SELECT status FROM beads WHERE id = ANY (NEW.blocked_by) AND id <> NEW.id
                 ORDER BY id FOR SHARE) AS locked;
        -- The beads that exist now will exist until this transaction ends.
        PERFORM refuse_unknown_beads('blocked_by', array_remove(NEW.blocked_by, NEW.id));
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
    DELETE FROM bead_blockers
     WHERE bead_id = NEW.id AND blocker_id = ANY (CASE WHEN TG_OP = 'UPDATE' THEN OLD.blocked_by END)
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
            UPDATE beads SET blocked_by = array_remove(blocked_by, me)
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
            PERFORM check_bead_cycle(NEW.parent);
        END IF;
    END IF;
    IF TG_OP <> 'INSERT' AND OLD.fencing_token <> COALESCE(CASE TG_OP WHEN 'UPDATE' THEN NEW.fencing_token END, 0) THEN
        PERFORM note_claim_ended(OLD, CASE
            WHEN TG_OP = 'UPDATE' AND NEW.attempts > OLD.attempts AND OLD.lease_expires_at <= clock_timestamp()
            THEN 'lapsed' ELSE 'changed' END);
    END IF;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS bead_inserted_with_parent ON beads;
CREATE TRIGGER bead_inserted_with_parent AFTER INSERT ON beads FOR EACH ROW
    WHEN (NEW.parent IS NOT NULL) EXECUTE FUNCTION on_bead_closed_or_reopened();
DROP TRIGGER IF EXISTS bead_closed_or_reopened ON beads;
CREATE TRIGGER bead_closed_or_reopened AFTER UPDATE ON beads FOR EACH ROW
    WHEN (OLD.claimed_at IS NOT NULL OR NEW.claimed_at IS NULL) -- not for a new claim
    EXECUTE FUNCTION on_bead_closed_or_reopened();
DROP TRIGGER IF EXISTS bead_deleted ON beads;
CREATE TRIGGER bead_deleted AFTER DELETE ON beads FOR EACH ROW EXECUTE FUNCTION on_bead_closed_or_reopened();

-- By hand, too, the graph is locked before the rows.
CREATE OR REPLACE FUNCTION on_beads_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM lock_bead_graph(true);
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS beads_deleted ON beads;
CREATE TRIGGER beads_deleted BEFORE DELETE ON beads FOR EACH STATEMENT EXECUTE FUNCTION on_beads_deleted();

CREATE OR REPLACE FUNCTION open_children_of(bead text) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT to_jsonb(ARRAY(SELECT c.id FROM beads c WHERE c.parent = bead AND c.status <> 'closed' ORDER BY c.id));
$$;
