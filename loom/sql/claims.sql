-- Claims: which agent works on which bead, until when.

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

-- Ends a claim that was not completed: the bead is open again, or blocked when it has failed too often. The caller has the
-- bead's row locked. how: as in claims.ended_how.
CREATE OR REPLACE FUNCTION give_back(b beads, how text, why text, delay interval) RETURNS beads LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp();
    n_attempts integer := b.attempts + (how <> 'released')::int;
    n_failures integer := b.failures + (how = 'failed')::int;
    stop text := CASE WHEN how = 'released' THEN NULL
                      WHEN n_failures >= setting('beads.max_failures') THEN format('failed %s times, the last time: %s', n_failures, COALESCE(why, how))
                      WHEN n_attempts >= setting('beads.max_attempts') THEN format('claimed %s times without success, the last time: %s',
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
CREATE OR REPLACE FUNCTION lapse_claims(batch integer) RETURNS SETOF beads
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
            PERFORM give_back(b, 'lapsed', NULL, NULL);
        END IF;
    END LOOP;
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
CREATE OR REPLACE FUNCTION enter_claim(agent text, names text[], fences jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    state text;
BEGIN
    PERFORM enter_names(ARRAY['agent:' || agent] || names, fences);
    SELECT status INTO state FROM agents WHERE id = agent;
    IF NOT FOUND THEN
        PERFORM raise_unknown('agent_id', agent);
    ELSIF state = 'dead' THEN -- it lives
        UPDATE agents SET status = 'idle', heartbeat_at = CASE WHEN heartbeat_at IS NOT NULL THEN clock_timestamp() END
         WHERE id = agent;
    END IF;
END $$;

-- Opens again what has lapsed, before a claim looks what there is. Our own agent's row first: the others are only tried.
CREATE OR REPLACE FUNCTION lapse_before_claim(agent text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    t timestamptz := clock_timestamp(); -- a variable can be looked up in an index, the function cannot
BEGIN
    -- The first one, which the index answers: for EXISTS the planner may choose to read all beads.
    IF (SELECT wakes_at(not_before, lease_expires_at) FROM beads WHERE wakes_at(not_before, lease_expires_at) <= t
         ORDER BY wakes_at(not_before, lease_expires_at) LIMIT 1) IS NOT NULL THEN
        PERFORM 1 FROM agents WHERE id = agent FOR NO KEY UPDATE;
        PERFORM lapse_claims(100);
    END IF;
END $$;

-- The agent's beads, when they are as many as it may have at once; else null.
CREATE OR REPLACE FUNCTION busy_with(agent text) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT jsonb_build_object('beads', ARRAY(
               SELECT b.id FROM beads b WHERE b.assigned_to = agent AND b.status = 'in_progress'
                  AND b.fencing_token IS NOT NULL ORDER BY b.id))
      FROM agents a WHERE a.id = agent AND a.open_claims >= setting('agents.max_concurrent');
$$;

-- Claims the best ready bead: by priority, then due date, then age. outcome: 'claimed', 'nothing', 'agent-busy' (detail: its
-- beads), 'unknown-project', or as enter_claim. In one value, JSON: a row of several took 4 % longer.
CREATE OR REPLACE FUNCTION claim_next(
    agent text, lease integer, fences jsonb, project text DEFAULT NULL, kinds text[] DEFAULT NULL, wanted text[] DEFAULT NULL)
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
            PERFORM enter_claim(agent, '{}', fences);
            PERFORM compare_fencing_identity();
            PERFORM lapse_before_claim(agent);
            detail := busy_with(agent);
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
                   status <> 'dead' AND open_claims < setting('agents.max_concurrent')
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

-- Claims one bead. outcome: 'claimed', 'same' (the agent's claim of before), 'not-found', 'bead-claimed' or reserved (detail:
-- agent_id, alive, lease_expires_at), 'bead-blocked' (detail: blocked_by, children, not_before, blocked_reason), 'bead-closed'
-- (detail: closed_at), 'agent-busy' (detail: its beads), or as enter_claim.
CREATE OR REPLACE FUNCTION claim_bead(
    wanted text, agent text, lease integer, fences jsonb, OUT outcome text, OUT bead jsonb, OUT detail jsonb) LANGUAGE plpgsql AS $$
DECLARE
    b beads;
    dead boolean;
BEGIN
    PERFORM enter_claim(agent, ARRAY['bead:' || wanted], fences);
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
    SELECT agent_is_dead(a) INTO dead FROM agents a WHERE a.id = b.assigned_to;
    IF b.fencing_token IS NOT NULL AND (dead OR b.lease_expires_at <= clock_timestamp()) THEN
        PERFORM 1 FROM agents WHERE id IN (agent, b.assigned_to) ORDER BY id FOR NO KEY UPDATE;
        b := give_back(b, CASE WHEN b.lease_expires_at <= clock_timestamp() THEN 'lapsed' ELSE 'agent-died' END,
                       NULL, NULL);
    END IF;
    IF b.status = 'closed' THEN
        outcome := 'bead-closed';
        detail := jsonb_build_object('closed_at', b.closed_at);
    ELSIF b.assigned_to <> agent OR (b.status = 'in_progress' AND b.assigned_to IS NULL) THEN
        outcome := 'bead-claimed';
        detail := jsonb_build_object('holder', holder_of(b));
    ELSIF b.status = 'blocked' OR b.open_blockers > 0 OR b.open_children > 0 OR b.not_before > clock_timestamp() THEN
        outcome := 'bead-blocked';
        detail := jsonb_build_object(
            'blocked_by', ARRAY(SELECT x.id FROM beads x WHERE x.id = ANY (b.blocked_by) AND x.status <> 'closed' ORDER BY x.id),
            'children', open_children_of(wanted),
            'not_before', CASE WHEN b.not_before > clock_timestamp() THEN b.not_before END,
            'blocked_reason', b.blocked_reason);
    ELSE
        IF busy_with(agent) IS NOT NULL THEN
            PERFORM lapse_before_claim(agent); -- its own may be over
        END IF;
        detail := busy_with(agent);
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

-- The detail of 'claim-lost': how and when this claim of the bead ended (null if it never was), and who has claimed it now.
CREATE OR REPLACE FUNCTION claim_lost(b beads, token bigint) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT jsonb_build_object('bead_id', b.id, 'fencing_token', token, 'ended_how', past.ended_how, 'ended_at', past.ended_at,
                              'holder', CASE WHEN b.lease_expires_at > clock_timestamp() THEN holder_of(b) END)
      FROM (SELECT) AS one LEFT JOIN (
          SELECT ended_how, ended_at FROM claims WHERE fencing_token = token AND bead_id = b.id
          UNION ALL
          SELECT 'lapsed', b.lease_expires_at WHERE b.fencing_token = token AND b.lease_expires_at <= clock_timestamp()
      ) AS past ON true;
$$;

-- Extends a claim; never revives one, never shortens it with `extend`. The row first, only then the clock. outcome: 'renewed',
-- 'claim-lost', 'not-found'.
CREATE OR REPLACE FUNCTION renew_claim(
    wanted text, token bigint, lease integer, extend boolean, fences jsonb, OUT outcome text, OUT bead jsonb, OUT detail jsonb)
LANGUAGE plpgsql AS $$
DECLARE
    b beads;
BEGIN
    PERFORM enter_names('{}', fences);
    SELECT * INTO b FROM beads WHERE id = wanted FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 'not-found';
        RETURN;
    ELSIF b.fencing_token IS DISTINCT FROM token OR b.lease_expires_at <= clock_timestamp() THEN
        outcome := 'claim-lost';
        detail := claim_lost(b, token);
        RETURN;
    END IF;
    UPDATE beads SET lease_seconds = COALESCE(lease, lease_seconds),
                     lease_expires_at = GREATEST(CASE WHEN extend THEN lease_expires_at END,
                                                 clock_timestamp() + make_interval(secs => COALESCE(lease, lease_seconds)))
     WHERE id = wanted RETURNING * INTO b;
    outcome := 'renewed';
    bead := as_json(b);
END $$;

-- Ends a claim by its holder. how: 'completed' (why: the close reason; more is merged into the context), 'failed' (delay: before
-- it is ready again, else by the number of failures), 'released'. outcome: 'ended', 'repeated' (it had ended in this way before),
-- 'claim-lost', 'open-children' (detail: their ids; nothing was done: the claim and its lease are as they were), 'not-found'.
CREATE OR REPLACE FUNCTION end_claim(
    wanted text, token bigint, how text, why text, more jsonb, delay integer, fences jsonb,
    OUT outcome text, OUT bead jsonb, OUT detail jsonb) LANGUAGE plpgsql AS $$
DECLARE
    b beads;
    t timestamptz;
BEGIN
    -- A repetition is told so even if the fences that it presents have ended with its first time.
    IF EXISTS (SELECT 1 FROM claims WHERE fencing_token = token AND bead_id = wanted AND ended_how = how) THEN
        outcome := 'repeated';
        SELECT as_json(x) INTO bead FROM beads x WHERE x.id = wanted;
        RETURN;
    END IF;
    PERFORM enter_names(ARRAY['bead:' || wanted], fences);
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
        outcome := 'claim-lost';
        detail := claim_lost(b, token);
        RETURN;
    ELSIF how = 'completed' AND b.open_children > 0 THEN
        -- A transaction that adds or reopens a child counts it in this row, which is locked here: none is added before the end.
        outcome := 'open-children';
        detail := jsonb_build_object('bead_id', wanted, 'children', open_children_of(wanted));
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
            b, how, why, make_interval(secs => COALESCE(delay, LEAST(30 * 2 ^ LEAST(b.failures, 10), 3600)))));
    END IF;
END $$;
