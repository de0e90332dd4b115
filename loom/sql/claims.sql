-- Claims: which agent works on which bead, until when.
--
-- The order of locking, also in agents.sql and lapses.sql: names (advisory locks), the graph of the beads (an advisory
-- lock), beads by id, agents by id. A function that has locked an agent's row locks further beads and agents only with
-- SKIP LOCKED, and only tries to lock further names.

-- The file locks that end with the claim of a bead.
CREATE OR REPLACE FUNCTION file_locks_of(bead text) RETURNS SETOF distributed_locks LANGUAGE sql STABLE AS $$
    SELECT * FROM distributed_locks
     WHERE metadata ->> 'bead_id' = bead AND metadata ? 'file_path' AND lock_name LIKE 'file:%'
       AND expires_at > clock_timestamp();
$$;

-- Writes the history of a claim that has ended, counts it out of its agent's open_claims, and ends the file locks that
-- were taken for it. how: how it ended; the setting loom.claim_ended comes first.
CREATE OR REPLACE FUNCTION note_claim_ended(was beads, how text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO claims VALUES (
        was.fencing_token, was.id, was.assigned_to, was.claimed_at, was.lease_expires_at, clock_timestamp(),
        COALESCE(NULLIF(current_setting('loom.claim_ended', true), ''), how),
        NULLIF(current_setting('loom.claim_reason', true), ''));
    UPDATE agents SET open_claims = GREATEST(open_claims - 1, 0), -- by hand, it may have been set to anything
                      current_bead = CASE WHEN current_bead = was.id THEN (
                          SELECT b.id FROM beads b WHERE b.assigned_to = was.assigned_to AND b.status = 'in_progress'
                             AND b.fencing_token IS NOT NULL AND b.id <> was.id ORDER BY b.claimed_at DESC LIMIT 1)
                          ELSE current_bead END
     WHERE id = was.assigned_to;
    PERFORM end_grants(ARRAY(SELECT file_locks_of(was.id)), 'released');
END $$;

-- Ends a claim without success: the bead is open again, or blocked when it has failed too often. The caller has locked
-- its row. how: as in claims.ended_how. delay: before it is ready again, after a failure.
CREATE OR REPLACE FUNCTION reopen_bead(b beads, how text, reason text DEFAULT NULL, delay interval DEFAULT NULL)
RETURNS beads LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp();
    n_attempts integer := b.attempts + (how <> 'released')::int;
    n_failures integer := b.failures + (how = 'failed')::int;
    last_time text := 'the last time: ' || COALESCE(reason, how);
    new_blocked_reason text := CASE
        WHEN how = 'released' THEN NULL
        WHEN n_failures >= setting('beads.max_failures') THEN format('failed %s times, %s', n_failures, last_time)
        WHEN n_attempts >= setting('beads.max_attempts') THEN
            format('claimed %s times without success, %s', n_attempts, last_time) END;
BEGIN
    -- Waits for the transactions that this claim fences. Callers that must not wait have already locked the row FOR
    -- UPDATE SKIP LOCKED.
    PERFORM 1 FROM beads WHERE id = b.id FOR UPDATE;
    IF how IN ('lapsed', 'agent-died') THEN
        RAISE NOTICE 'loom: bead_given_back'; -- for loom/metrics.py
    END IF;
    PERFORM set_config('loom.claim_ended', how, true), set_config('loom.claim_reason', COALESCE(reason, ''), true);
    UPDATE beads SET status = CASE WHEN new_blocked_reason IS NULL THEN 'open' ELSE 'blocked' END,
                     assigned_to = NULL, fencing_token = NULL, claimed_at = NULL, lease_seconds = NULL,
                     lease_expires_at = NULL, attempts = n_attempts, failures = n_failures,
                     blocked_reason = new_blocked_reason,
                     not_before = CASE WHEN how = 'failed' AND new_blocked_reason IS NULL AND delay > INTERVAL '0'
                                       THEN t + delay END,
                     version = version + 1, updated_at = t
     WHERE id = b.id RETURNING * INTO b;
    PERFORM set_config('loom.claim_ended', '', true), set_config('loom.claim_reason', '', true);
    PERFORM write_event('bead.status_change', b.id, b.version, b.project_id, t, jsonb_build_object(
        'status', b.status, 'assigned_to', NULL, 'fencing_token', NULL, 'attempts', b.attempts, 'failures', b.failures,
        'blocked_reason', b.blocked_reason, 'claim_ended', how, 'reason', reason));
    RETURN b;
END $$;

-- The detail of 'agent-busy', when the agent has as many claims as it may have; else null.
CREATE OR REPLACE FUNCTION agent_busy(agent text) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT jsonb_build_object('beads', ARRAY(
               SELECT b.id FROM beads b WHERE b.assigned_to = agent AND b.status = 'in_progress'
                  AND b.fencing_token IS NOT NULL ORDER BY b.id))
      FROM agents a WHERE a.id = agent AND a.open_claims >= setting('agents.max_concurrent');
$$;

-- Takes the names of a claim. The agent's is one of them, so that only one claim at a time adds to its counter.
CREATE OR REPLACE FUNCTION enter_claim(agent text, names text[], fences jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM enter_names(ARRAY['agent:' || agent] || names, fences);
    PERFORM raise_unknown('agent_id', agent) WHERE NOT EXISTS (SELECT 1 FROM agents WHERE id = agent);
    PERFORM compare_fencing_identity();
END $$;

-- An agent that claims lives, even if it was declared dead. The caller has locked all the beads that it needs.
CREATE OR REPLACE FUNCTION revive_agent(agent text) RETURNS void LANGUAGE sql AS $$
    UPDATE agents SET status = 'idle', heartbeat_at = CASE WHEN heartbeat_at IS NOT NULL THEN clock_timestamp() END
     WHERE id = agent AND status = 'dead';
$$;

-- Gives the bead to the agent, and returns the bead. The caller has locked the names of both and the bead's row.
-- at_once: this is the short way, in which claim_next() has done nothing else. Returns null if the short way does not
-- apply: the agent is dead or busy, a name is held from outside, the fencing identity has changed, a lease or delay has
-- ended, or a bead is reserved for the agent.
CREATE OR REPLACE FUNCTION start_claim(bead text, agent text, lease integer, at_once boolean DEFAULT false) RETURNS json
LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp();
    answer json;
BEGIN
    UPDATE agents SET open_claims = open_claims + 1, current_bead = bead, last_active = t,
                      heartbeat_at = CASE WHEN heartbeat_at IS NOT NULL THEN t END
     WHERE id = agent AND (NOT at_once OR (
           status <> 'dead' AND open_claims < setting('agents.max_concurrent')
           AND NOT EXISTS (SELECT 1 FROM distributed_locks
                            WHERE lock_name IN ('bead:' || bead, 'agent:' || agent) AND expires_at > t)
           AND (SELECT fencing_identity FROM cluster) = fencing_identity_now()
           AND (SELECT status FROM beads
                 WHERE status IN ('deferred', 'in_progress', 'open') AND wakes_at(not_before, lease_expires_at) <= t
                 ORDER BY status, wakes_at(not_before, lease_expires_at) LIMIT 1) IS NULL
           AND NOT EXISTS (SELECT 1 FROM beads
                            WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to = agent)));
    IF NOT FOUND THEN
        PERFORM raise_unknown('agent_id', agent) WHERE NOT at_once; -- deleted by hand since enter_claim()
        RETURN NULL;
    END IF;
    UPDATE beads SET status = 'in_progress', assigned_to = agent, fencing_token = nextval('fencing_tokens'),
                     claimed_at = t, lease_seconds = lease, lease_expires_at = t + make_interval(secs => lease),
                     not_before = NULL, version = version + 1, updated_at = t
     WHERE id = bead
    RETURNING as_json(beads), write_event('bead.assigned', id, version, project_id, t, jsonb_build_object(
        'status', status, 'assigned_to', assigned_to, 'fencing_token', fencing_token)) INTO answer;
    RETURN answer;
END $$;

-- Whether a claim with these filters may have the bead. Inlined by the planner.
CREATE OR REPLACE FUNCTION fits(id text, type text, tags text[], skipped text[], types text[], with_tags text[])
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT id <> ALL (skipped) AND (types IS NULL OR type = ANY (types)) AND (with_tags IS NULL OR tags @> with_tags);
$$;

-- Locks the best ready bead that is reserved for nobody; skips locked rows. No due date sorts last. With a filter
-- by types or tags it looks at the first 200 beads, and if none fits, for the best of each type or for all with the
-- tags: to read on in order took 300 ms for a type that few of 500,000 beads have. One statement for a project and for
-- all cannot use the index of a project.
CREATE OR REPLACE FUNCTION pick_free_bead(project text, skipped text[], types text[], with_tags text[])
RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    best text;
    fitting text[];
    more boolean := true;
BEGIN
    IF types IS NULL AND with_tags IS NULL AND project IS NULL THEN
        SELECT id INTO best FROM beads
         WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL
           AND id <> ALL (skipped)
         ORDER BY assigned_to, priority, due_date, created_at LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED;
        RETURN best;
    ELSIF types IS NULL AND with_tags IS NULL THEN
        SELECT id INTO best FROM beads
         WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL
           AND project_id = project
           AND id <> ALL (skipped)
         ORDER BY priority, due_date, created_at LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED;
        RETURN best;
    END IF;
    FOR attempt IN 1 .. 2 LOOP
        IF attempt = 1 AND project IS NULL THEN
            SELECT array_agg(id) FILTER (WHERE fits(id, type, tags, skipped, types, with_tags)), count(*) = 200
              INTO fitting, more FROM (
                SELECT id, type, tags FROM beads
                 WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL
                 ORDER BY assigned_to, priority, due_date, created_at LIMIT 200) AS b;
        ELSIF attempt = 1 THEN
            SELECT array_agg(id) FILTER (WHERE fits(id, type, tags, skipped, types, with_tags)), count(*) = 200
              INTO fitting, more FROM (
                SELECT id, type, tags FROM beads
                 WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL
                   AND project_id = project
                 ORDER BY priority, due_date, created_at LIMIT 200) AS b;
        ELSIF with_tags IS NOT NULL THEN
            fitting := ARRAY(
                SELECT id FROM ( -- unordered: with an order it might read all beads; the best of the first 2000 will do
                    SELECT * FROM beads
                     WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL
                       AND tags <> '{}' AND tags @> with_tags AND (project IS NULL OR project_id = project)
                       AND fits(id, type, tags, skipped, types, NULL) LIMIT 2000) AS b
                 ORDER BY priority, due_date, created_at LIMIT 100);
        ELSE
            fitting := ARRAY(
                SELECT b.id FROM unnest(types) AS kind CROSS JOIN LATERAL (
                    SELECT id FROM beads
                     WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL
                       AND type = kind AND (project IS NULL OR project_id = project) AND id <> ALL (skipped)
                     ORDER BY priority, due_date, created_at LIMIT 100) AS b);
        END IF;
        SELECT id INTO best FROM beads
         WHERE id = ANY (fitting) AND is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL
           AND (project IS NULL OR project_id = project) AND fits(id, type, tags, skipped, types, with_tags)
         ORDER BY priority, due_date, created_at LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED;
        EXIT WHEN best IS NOT NULL OR NOT more;
    END LOOP;
    RETURN best;
END $$;

-- Claims the best ready bead: by priority, then due date, then age. outcome: 'claimed', 'nothing', 'agent-busy'
-- (detail: its beads), 'unknown-project'; raises as enter_claim(). In one value: a row of several columns took 4 %
-- longer.
CREATE OR REPLACE FUNCTION claim_next(
    agent text, lease integer, fences jsonb,
    project text DEFAULT NULL, types text[] DEFAULT NULL, with_tags text[] DEFAULT NULL)
RETURNS json LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    busy jsonb;
    mine text;
    free text;
    best text;
    bead json;
    skipped text[]; -- ids of beads whose names are held from outside, or locked by other transactions
BEGIN
    -- The usual case: nothing must be done first, and no bead is reserved for the agent; start_claim() checks that. It
    -- is the same claim as below in fewer statements: the general way takes 1.4 times the instructions.
    IF fences IS NULL THEN
        PERFORM pg_advisory_xact_lock(name_key('agent:' || agent));
        IF project IS NULL AND types IS NULL AND with_tags IS NULL THEN
            -- pick_free_bead() for this case, without the call: 5 % of a claim
            SELECT id INTO best FROM beads
             WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL
             ORDER BY assigned_to, priority, due_date, created_at LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED;
        ELSE
            best := pick_free_bead(project, '{}', types, with_tags);
        END IF;
        -- A transaction that holds row locks only tries a name: if it waited, it would deadlock with one that holds the
        -- name and waits for the row.
        IF pg_try_advisory_xact_lock(name_key('bead:' || best)) THEN
            bead := start_claim(best, agent, lease, at_once => true);
            IF bead IS NOT NULL THEN
                RETURN json_build_object('outcome', 'claimed', 'bead', bead);
            END IF;
        END IF;
    END IF;

    PERFORM enter_claim(agent, '{}', fences);
    PERFORM revive_agent(agent); -- the agent's row may be locked now: lock beads only with SKIP LOCKED
    PERFORM wake_beads(agent);
    busy := agent_busy(agent);
    IF busy IS NOT NULL THEN
        RETURN json_build_object('outcome', 'agent-busy', 'detail', busy);
    END IF;
    -- The names that begin with 'bead:'; ';' is the character after ':'.
    skipped := ARRAY(SELECT substr(lock_name, 6) FROM distributed_locks
                      WHERE lock_name >= 'bead:' AND lock_name < 'bead;' AND expires_at > clock_timestamp());
    FOR n IN 1 .. 100 LOOP
        SELECT id INTO mine FROM beads -- the best that is reserved for the agent
         WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to = agent
           AND (project IS NULL OR project_id = project) AND fits(id, type, tags, skipped, types, with_tags)
         ORDER BY priority, due_date, created_at LIMIT 1;
        free := pick_free_bead(project, skipped, types, with_tags);
        EXIT WHEN mine IS NULL AND free IS NULL;
        SELECT id INTO best FROM beads
         WHERE id IN (mine, free) AND is_ready(status, open_blockers, open_children, not_before)
           AND (assigned_to IS NULL OR assigned_to = agent)
         ORDER BY priority, due_date, created_at LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED;
        IF best IS NOT NULL AND try_name('bead:' || best) THEN
            RETURN json_build_object('outcome', 'claimed', 'bead', start_claim(best, agent, lease));
        END IF;
        skipped := skipped || COALESCE(best, mine);
    END LOOP;
    RETURN json_build_object('outcome', CASE WHEN project IS NULL OR EXISTS (SELECT 1 FROM projects WHERE id = project)
                                             THEN 'nothing' ELSE 'unknown-project' END);
END $$;

-- Claims one bead. outcome: 'claimed', 'same' (the claim that the agent already has), 'not-found', 'bead-claimed': by,
-- or reserved for, another agent (detail: holder), 'bead-blocked' (detail: blocked_by, children, not_before,
-- blocked_reason), 'bead-closed' (detail: closed_at), 'agent-busy' (detail: its beads); raises as enter_claim().
CREATE OR REPLACE FUNCTION claim_bead(
    bead_id text, agent text, lease integer, fences jsonb, OUT outcome text, OUT bead json, OUT detail jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    b beads;
    t timestamptz;
BEGIN
    PERFORM enter_claim(agent, ARRAY['bead:' || bead_id], fences);
    SELECT * INTO b FROM beads WHERE id = bead_id FOR NO KEY UPDATE;
    t := clock_timestamp();
    IF b.fencing_token IS NOT NULL AND (b.lease_expires_at <= t OR (b.assigned_to <> agent AND EXISTS (
           SELECT 1 FROM agents a WHERE a.id = b.assigned_to AND agent_is_dead(a)))) THEN
        PERFORM 1 FROM beads WHERE id = bead_id FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN -- a transaction that the claim fences is still running: the bead is still held
            outcome := 'bead-claimed';
            detail := jsonb_build_object('holder', holder_of(b));
            RETURN;
        END IF;
        PERFORM 1 FROM agents WHERE id IN (agent, b.assigned_to) ORDER BY id FOR NO KEY UPDATE;
        b := reopen_bead(b, how_ended(b));
    END IF;
    PERFORM revive_agent(agent);
    IF b.id IS NULL THEN
        outcome := 'not-found';
        RETURN;
    ELSIF b.fencing_token IS NOT NULL AND b.assigned_to = agent THEN
        UPDATE beads SET lease_seconds = lease,
                         lease_expires_at = GREATEST(lease_expires_at, clock_timestamp() + make_interval(secs => lease))
         WHERE id = bead_id RETURNING * INTO b;
        outcome := 'same';
        bead := as_json(b);
        RETURN;
    END IF;

    IF b.status = 'deferred' AND b.not_before <= clock_timestamp() THEN
        UPDATE beads SET status = 'open', not_before = NULL WHERE id = bead_id RETURNING * INTO b;
    END IF;
    IF b.status = 'closed' THEN
        outcome := 'bead-closed';
        detail := jsonb_build_object('closed_at', b.closed_at);
    ELSIF b.assigned_to <> agent OR (b.status = 'in_progress' AND b.assigned_to IS NULL) THEN
        outcome := 'bead-claimed';
        detail := jsonb_build_object('holder', holder_of(b));
    ELSIF b.status IN ('blocked', 'deferred') OR b.open_blockers > 0 OR b.open_children > 0
          OR b.not_before > clock_timestamp() THEN
        outcome := 'bead-blocked';
        detail := jsonb_build_object(
            'blocked_by', ARRAY(SELECT x.id FROM beads x
                                 WHERE x.id = ANY (b.blocked_by) AND x.status <> 'closed' ORDER BY x.id),
            'children', open_children_of(bead_id),
            'not_before', CASE WHEN b.not_before > clock_timestamp() THEN b.not_before END,
            'blocked_reason', b.blocked_reason);
    ELSE
        IF agent_busy(agent) IS NOT NULL THEN
            PERFORM wake_beads(agent); -- the lease of one of its claims may have ended
            detail := agent_busy(agent);
        END IF;
        outcome := CASE WHEN detail IS NULL THEN 'claimed' ELSE 'agent-busy' END;
        bead := CASE WHEN detail IS NULL THEN start_claim(bead_id, agent, lease) END;
    END IF;
END $$;

-- The detail of 'claim-lost': how and when this claim of the bead ended (null if no such claim is known), and who has
-- claimed the bead now.
CREATE OR REPLACE FUNCTION claim_lost(b beads, token bigint) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT jsonb_build_object(
               'bead_id', b.id, 'fencing_token', token, 'ended_how', past.ended_how, 'ended_at', past.ended_at,
               'holder', CASE WHEN b.lease_expires_at > clock_timestamp() THEN holder_of(b) END)
      FROM (SELECT) AS one LEFT JOIN (
          SELECT ended_how, ended_at FROM claims WHERE fencing_token = token AND bead_id = b.id
          UNION ALL
          SELECT 'lapsed', b.lease_expires_at
           WHERE b.fencing_token = token AND b.lease_expires_at <= clock_timestamp()
      ) AS past ON true;
$$;

-- Gives a claim a new end, with `extend` never an earlier one; never revives a claim that has ended. The order matters:
-- lock the row before reading the clock. outcome: 'renewed', 'claim-lost', 'not-found'.
CREATE OR REPLACE FUNCTION renew_claim(
    bead_id text, token bigint, lease integer, extend boolean, fences jsonb,
    OUT outcome text, OUT bead json, OUT detail jsonb) LANGUAGE plpgsql AS $$
DECLARE
    b beads;
BEGIN
    PERFORM enter_names('{}', fences);
    SELECT * INTO b FROM beads WHERE id = bead_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 'not-found';
        RETURN;
    ELSIF b.fencing_token IS DISTINCT FROM token OR b.lease_expires_at <= clock_timestamp() THEN
        outcome := 'claim-lost';
        detail := claim_lost(b, token);
        RETURN;
    END IF;
    lease := COALESCE(lease, b.lease_seconds);
    UPDATE beads SET lease_seconds = lease,
                     lease_expires_at = GREATEST(CASE WHEN extend THEN lease_expires_at END,
                                                 clock_timestamp() + make_interval(secs => lease))
     WHERE id = bead_id RETURNING * INTO b;
    outcome := 'renewed';
    bead := as_json(b);
END $$;

-- Ends a claim by its holder. how: 'completed' (more is merged into the context), 'failed' (delay: seconds until the
-- bead is ready again; if null, it doubles with each failure up to an hour), 'released'. outcome: 'ended', 'repeated'
-- (it had already ended in this way), 'claim-lost', 'open-children' (detail: their ids; the claim goes on),
-- 'not-found'.
CREATE OR REPLACE FUNCTION end_claim(
    bead_id text, token bigint, how text, why text, more jsonb, delay integer, fences jsonb,
    OUT outcome text, OUT bead json, OUT detail jsonb) LANGUAGE plpgsql AS $$
DECLARE
    b beads;
    t timestamptz;
    was jsonb;
BEGIN
    -- Before the fences are checked: a repeated request may present one that ended when it was served the first time.
    IF EXISTS (SELECT 1 FROM claims c
                WHERE c.fencing_token = token AND c.bead_id = end_claim.bead_id AND c.ended_how = how) THEN
        outcome := 'repeated';
        SELECT as_json(x) INTO bead FROM beads x WHERE x.id = end_claim.bead_id;
        RETURN;
    END IF;
    PERFORM enter_names(ARRAY['bead:' || bead_id], fences);
    IF how = 'completed' THEN
        PERFORM lock_beads(bead_id, '{}', true);
    END IF;
    SELECT * INTO b FROM beads WHERE id = bead_id FOR UPDATE; -- waits for the transactions that the claim fences
    t := clock_timestamp();
    IF NOT FOUND THEN
        outcome := 'not-found';
    ELSIF b.fencing_token IS DISTINCT FROM token OR b.lease_expires_at <= t THEN
        outcome := 'claim-lost';
        detail := claim_lost(b, token);
    ELSIF how = 'completed' AND b.open_children > 0 THEN
        -- A transaction that adds or reopens a child counts it in this row, which is locked here.
        outcome := 'open-children';
        detail := jsonb_build_object('bead_id', bead_id, 'children', open_children_of(bead_id));
    END IF;
    IF outcome IS NOT NULL THEN
        RETURN;
    END IF;

    outcome := 'ended';
    IF NULLIF(current_setting('loom.actor', true), '') IS NULL THEN
        PERFORM set_config('loom.actor', b.assigned_to, true);
    END IF;
    IF how <> 'completed' THEN
        delay := COALESCE(delay, LEAST(30 * 2 ^ LEAST(b.failures, 10), 3600));
        bead := as_json(reopen_bead(b, how, why, make_interval(secs => delay)));
        RETURN;
    END IF;
    was := CASE WHEN more IS NOT NULL THEN to_jsonb(b) END;
    PERFORM set_config('loom.claim_ended', how, true), set_config('loom.claim_reason', COALESCE(why, ''), true);
    UPDATE beads SET status = 'closed', fencing_token = NULL, claimed_at = NULL, lease_seconds = NULL,
                     lease_expires_at = NULL, closed_at = t, close_reason = why,
                     context = CASE WHEN more IS NULL THEN context ELSE merge_patch(context, more) END,
                     version = version + 1, updated_at = t
     WHERE id = bead_id RETURNING * INTO b;
    PERFORM set_config('loom.claim_ended', '', true), set_config('loom.claim_reason', '', true);
    IF more IS NOT NULL THEN
        PERFORM refuse_too_large('bead', bead_id, was, to_jsonb(b));
    END IF;
    PERFORM write_event('bead.completed', bead_id, b.version, b.project_id, t, jsonb_build_object(
        'status', 'closed', 'fencing_token', NULL, 'closed_at', b.closed_at, 'close_reason', b.close_reason)
        || CASE WHEN more IS NULL THEN '{}'
                ELSE jsonb_build_object('context', patch_between(was -> 'context', b.context)) END);
    bead := as_json(b);
END $$;
