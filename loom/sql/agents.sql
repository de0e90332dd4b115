-- Agents: heartbeats, and what ends with an agent.

-- When an agent dies or is deleted, the beads that it had claimed are open again. Deleted, it also frees its files.
CREATE OR REPLACE FUNCTION on_agent_ended() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM reopen_beads_of(OLD.id);
    IF TG_OP = 'DELETE' THEN
        UPDATE beads SET assigned_to = NULL WHERE id IN (SELECT beads_of(OLD.id));
        PERFORM end_grants(ARRAY(SELECT file_locks_batch(OLD.id)), 'released');
    END IF;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS agent_deleted ON agents;
CREATE TRIGGER agent_deleted AFTER DELETE ON agents FOR EACH ROW EXECUTE FUNCTION on_agent_ended();
DROP TRIGGER IF EXISTS agent_died ON agents;
CREATE TRIGGER agent_died AFTER UPDATE OF status ON agents FOR EACH ROW
    WHEN (NEW.status = 'dead' AND OLD.status <> 'dead') EXECUTE FUNCTION on_agent_ended();

-- The agent that a name stands for, where a bead is assigned: its id, or the role that no other agent has. Null if
-- none.
CREATE OR REPLACE FUNCTION agent_named(given text) RETURNS text LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF given IS NULL OR EXISTS (SELECT 1 FROM agents WHERE id = given) THEN
        RETURN given;
    END IF;
    RETURN (SELECT min(id) FROM (SELECT id FROM agents WHERE role = given AND role <> '' LIMIT 2) AS a
            HAVING count(*) = 1);
END $$;

-- An agent is dead when it is marked so, or when it has sent heartbeats once and none for so long, unless the database
-- was away meanwhile.
CREATE OR REPLACE FUNCTION agent_is_dead(a agents) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT a.status = 'dead' OR COALESCE(
        a.heartbeat_at < clock_timestamp() - make_interval(secs => setting('agents.dead_after'))
        AND heartbeats_count(), false);
$$;

-- Who has the bead. alive is null when nobody has it; lease_expires_at, when it is not claimed.
CREATE OR REPLACE FUNCTION holder_of(b beads) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT jsonb_build_object('agent_id', b.assigned_to, 'lease_expires_at', b.lease_expires_at,
                              'alive', (SELECT NOT agent_is_dead(a) FROM agents a WHERE a.id = b.assigned_to));
$$;

-- Reopens the beads that a dead agent has claimed. One whose name is locked or held from outside lapses instead.
CREATE OR REPLACE FUNCTION reopen_beads_of(agent text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    b beads;
BEGIN
    FOR b IN SELECT * FROM beads WHERE assigned_to = agent AND status = 'in_progress' AND fencing_token IS NOT NULL
              ORDER BY id FOR NO KEY UPDATE
    LOOP
        IF try_name('bead:' || b.id) THEN
            PERFORM reopen_bead(b, how_ended(b));
        ELSE
            UPDATE beads SET lease_expires_at = LEAST(lease_expires_at, clock_timestamp()) WHERE id = b.id;
        END IF;
    END LOOP;
END $$;

-- How the claim of a dead agent ended: a lease that is over has lapsed, since the agent may have been told so.
CREATE OR REPLACE FUNCTION how_ended(b beads) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN b.lease_expires_at > clock_timestamp() THEN 'agent-died' ELSE 'lapsed' END;
$$;

-- Ends an agent that has missed its heartbeats: reopens its beads, and marks it dead once none is left. Waits for
-- nothing. Answers 'dead', null when it is alive, or why it is not marked yet.
CREATE OR REPLACE FUNCTION end_dead_agent(agent text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    a agents;
    b beads;
    seen text[] := '{}';
BEGIN
    IF NOT try_name('agent:' || agent) THEN
        RETURN 'its lock is held';
    END IF;
    SELECT * INTO a FROM agents WHERE id = agent FOR NO KEY UPDATE SKIP LOCKED;
    IF a.id IS NULL AND EXISTS (SELECT 1 FROM agents WHERE id = agent) THEN
        RETURN 'its row is locked';
    ELSIF a.id IS NULL OR a.status = 'dead' OR NOT agent_is_dead(a) THEN
        RETURN NULL;
    END IF;
    FOR b IN SELECT * FROM beads WHERE assigned_to = agent AND status = 'in_progress' AND fencing_token IS NOT NULL
              ORDER BY id FOR UPDATE SKIP LOCKED
    LOOP
        seen := seen || b.id;
        IF try_to_reopen(b, how_ended(b)) IS NOT NULL THEN
            UPDATE beads SET lease_expires_at = LEAST(lease_expires_at, clock_timestamp()) WHERE id = b.id;
        END IF;
    END LOOP;
    IF EXISTS (SELECT 1 FROM beads WHERE assigned_to = agent AND status = 'in_progress' AND fencing_token IS NOT NULL
                  AND id <> ALL (seen)) THEN
        RETURN 'the row of a bead is locked';
    END IF;
    UPDATE agents SET status = 'dead' WHERE id = agent;
    RETURN 'dead';
END $$;

-- A heartbeat of an agent, which names the claims (bead -> token) that it still works on: each is extended by its own
-- lease. It takes no name: an agent must not die because somebody holds agent:ID from outside. extended: bead -> its
-- new end; lost: bead -> how its claim ended, or null. outcome: 'alive', 'unknown-agent'.
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
        UPDATE beads SET lease_expires_at = GREATEST(lease_expires_at,
                                                     clock_timestamp() + make_interval(secs => lease_seconds))
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
