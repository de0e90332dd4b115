-- File locks.

-- Rows of distributed_locks, named file:PROJECT:PATH, owned by agent:ID, with the metadata file_path, project_id,
-- agent_id and, when taken for a bead, bead_id: it ends with the bead's claim, see note_claim_ended().

-- Takes one for the agent that `about` names. The bead's row first, and it stays locked: its claim cannot end, and find
-- no lock to end with it, between a look at it and the commit. outcome: 'new', 'same', 'held', 'promised' as
-- acquire_lock (held: the grant that has it); 'claim-lost' (detail: bead_id, agent_id, and the holder of the bead, or
-- null).
CREATE OR REPLACE FUNCTION take_file_lock(
    name text, about jsonb, instance uuid, ttl interval, fences jsonb,
    OUT outcome text, OUT held jsonb, OUT detail jsonb) LANGUAGE plpgsql AS $$
DECLARE
    agent text := about ->> 'agent_id';
    b beads;
BEGIN
    PERFORM pg_advisory_xact_lock(name_key(name));
    PERFORM raise_unknown('project_id', about ->> 'project_id')
      WHERE NOT EXISTS (SELECT 1 FROM projects WHERE id = about ->> 'project_id');
    PERFORM raise_unknown('agent_id', agent) WHERE NOT EXISTS (SELECT 1 FROM agents WHERE id = agent);
    IF about ? 'bead_id' THEN
        SELECT * INTO b FROM beads WHERE id = about ->> 'bead_id' FOR SHARE;
        IF NOT FOUND THEN
            PERFORM raise_unknown('bead_id', about ->> 'bead_id');
        ELSIF b.fencing_token IS NULL OR b.lease_expires_at <= clock_timestamp() OR b.assigned_to <> agent THEN
            outcome := 'claim-lost';
            detail := jsonb_build_object('bead_id', b.id, 'agent_id', agent,
                                         'holder', CASE WHEN b.lease_expires_at > clock_timestamp()
                                                        THEN holder_of(b) END);
            RETURN;
        END IF;
    END IF;
    PERFORM enter_names('{}', fences);
    -- Until commit: a deletion ends the locks that the agent has then.
    PERFORM 1 FROM agents WHERE id = agent FOR KEY SHARE;
    PERFORM raise_unknown('agent_id', agent) WHERE NOT FOUND;
    -- What it was taken for stays when it is asked for again without a bead.
    about := COALESCE((SELECT metadata FROM distributed_locks
                        WHERE lock_name = name AND owner = 'agent:' || agent
                           AND expires_at > clock_timestamp()), '{}') || about;
    SELECT l.outcome, to_jsonb(l) - '{outcome, waiting}'::text[] INTO outcome, held
      FROM acquire_lock(name, 'agent:' || agent, instance, ttl, about, false) AS l;
    IF outcome = 'promised' THEN
        held := NULL;
    END IF;
END $$;

-- Ends the agent's lock, if it has it. True also when the proxy repeats the request that ended it (see acting_as): a
-- lock that the agent has taken since stays, and a grant that the request presents may have been the one that ended.
CREATE OR REPLACE FUNCTION release_file_lock(name text, agent text, fences jsonb) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    token bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(name_key(name));
    IF EXISTS (SELECT 1 FROM grants WHERE lock_name = name AND owner = 'agent:' || agent AND ended_how = 'released'
                  AND proxy_request_id = NULLIF(current_setting('loom.proxy_request_id', true), '')) THEN
        RETURN true;
    END IF;
    PERFORM enter_names('{}', fences);
    SELECT fencing_token INTO token FROM distributed_locks WHERE lock_name = name AND owner = 'agent:' || agent;
    RETURN release_lock(name, token, 'released', NULL);
END $$;
