-- Projects.

-- A closed project takes no beads: none is created in it, moved into it or reopened. on_bead_written() checks that with
-- the project's row locked FOR KEY SHARE, as a foreign key locks it. So closing takes FOR UPDATE, the one mode that
-- conflicts with it: a bead that is written at the same time is committed before, or refused. FOR SHARE there would do
-- without this, but then every change of a project would wait for the writers of its beads.
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
    WHEN (NOT importing()) EXECUTE FUNCTION on_project_written();

-- How many beads of a project are not closed.
CREATE OR REPLACE FUNCTION open_beads(project text) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT count(*) FROM beads WHERE project_id = project AND status IN ('open', 'in_progress', 'blocked', 'deferred');
$$;

-- Closes a project that has no open beads and is not perpetual. outcome: 'closed'; 'not-ready' (detail: open_beads,
-- is_perpetual); 'not-found'.
CREATE OR REPLACE FUNCTION close_project(key text, fences jsonb, OUT outcome text, OUT entity jsonb, OUT detail jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    p projects;
    unfinished bigint;
BEGIN
    PERFORM enter_names(ARRAY['project:' || key], fences);
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
