-- API keys: what instances read of them, the promise that an administrator's key is left, and what is another's.

-- Whether the caller may act for an agent: only one with the role agent is restricted, to the agent whose id is its
-- principal, and to those that its principal has registered.
CREATE OR REPLACE FUNCTION acts_for(agent text) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN COALESCE(current_setting('loom.restricted', true), '') = ''
        OR EXISTS (SELECT 1 FROM agents WHERE id = agent AND current_principal() IN (id, principal))
        OR COALESCE(agent = current_principal(), false);
END $$;

CREATE OR REPLACE FUNCTION raise_forbidden(problem text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%', problem USING ERRCODE = 'L0011';
END $$;

-- Raises L0011 (forbidden) unless the caller may act for the agent.
CREATE OR REPLACE FUNCTION refuse_other_agent(agent text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF NOT acts_for(agent) THEN
        PERFORM raise_forbidden(format('This key may not act for %s: its principal has not registered that agent.',
                                       agent));
    END IF;
END $$;

-- Raises L0011 for a change by a restricted caller of what is another's: an agent, a bead that somebody works on, or
-- one of `others` that the change would link to it; or a new agent with another's name. The names are locked.
CREATE OR REPLACE FUNCTION refuse_foreign_change(kind text, key text, creates boolean, others text[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    held text;
BEGIN
    IF kind = 'agent' AND NOT creates THEN
        PERFORM refuse_other_agent(key);
    ELSIF kind = 'agent' AND EXISTS (SELECT 1 FROM api_keys WHERE principal = key AND key <> current_principal()) THEN
        PERFORM raise_forbidden(format('The agent %s is registered with a key of its own.', key));
    ELSIF kind = 'bead' THEN
        SELECT id INTO held FROM beads
         WHERE id = ANY (others || key) AND status = 'in_progress' AND NOT acts_for(assigned_to)
           AND (id = key OR NOT (key = ANY (blocked_by) OR COALESCE(parent = key, false))) LIMIT 1;
        IF FOUND THEN
            PERFORM raise_forbidden(format('Somebody else works on bead %s.', held));
        END IF;
    END IF;
END $$;

-- Raises L0011 if a restricted caller would take a lock that concerns another: agent:ID, or bead:ID that somebody works
-- on. In a transaction of its own.
CREATE OR REPLACE FUNCTION refuse_foreign_lock(name text, who text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('loom.principal', who, true), set_config('loom.restricted', 'on', true);
    IF name LIKE 'agent:%' THEN
        PERFORM refuse_other_agent(substr(name, 7));
    ELSIF name LIKE 'bead:%' THEN
        PERFORM refuse_foreign_change('bead', substr(name, 6), false, '{}');
    END IF;
END $$;

-- Statement by statement, so that each change, also by hand, is seen by the instances with their next heartbeat.
CREATE OR REPLACE FUNCTION on_keys_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE key_changes SET number = number + 1;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS keys_changed ON api_keys;
CREATE TRIGGER keys_changed
    AFTER INSERT OR DELETE OR TRUNCATE OR UPDATE OF id, principal, role, hash, expires_at, revoked_at ON api_keys
    FOR EACH STATEMENT EXECUTE FUNCTION on_keys_changed();

CREATE OR REPLACE FUNCTION is_valid(k api_keys) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT k.revoked_at IS NULL AND COALESCE(k.expires_at > clock_timestamp(), true);
$$;

-- The valid keys, and a state that differs whenever they do; null if the state is the one that the caller knows.
CREATE OR REPLACE FUNCTION valid_keys(known text) RETURNS json LANGUAGE plpgsql STABLE AS $$
DECLARE
    state text := (SELECT number FROM key_changes) || '/'
        || (SELECT count(*) FROM api_keys WHERE expires_at <= clock_timestamp());
BEGIN
    IF state = known THEN
        RETURN NULL;
    END IF;
    RETURN json_build_object('state', state, 'keys', COALESCE((
        SELECT json_agg(json_build_object('id', id, 'principal', principal, 'role', role, 'hash', encode(hash, 'hex')))
          FROM api_keys k WHERE is_valid(k)), '[]'));
END $$;

-- Notes that these keys were used: for people, so once a minute is enough, and a locked row is skipped.
CREATE OR REPLACE FUNCTION note_key_uses(ids text[]) RETURNS void LANGUAGE sql AS $$
    UPDATE api_keys SET last_used_at = clock_timestamp() WHERE id IN (
        SELECT id FROM api_keys WHERE id = ANY (ids)
           AND COALESCE(last_used_at < clock_timestamp() - INTERVAL '1 minute', true) FOR NO KEY UPDATE SKIP LOCKED);
$$;

-- Ends a key at once, or after a time. outcome: 'revoked', 'not-found', 'last-admin-key' (with keeps_admin, if no other
-- valid key of an administrator would be left). Two that are revoked at the same time wait for each other.
CREATE OR REPLACE FUNCTION revoke_key(key_id text, who text, after interval, keeps_admin boolean) RETURNS text
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM key_changes FOR UPDATE;
    IF NOT EXISTS (SELECT 1 FROM api_keys WHERE id = key_id) THEN
        RETURN 'not-found';
    ELSIF keeps_admin AND EXISTS (SELECT 1 FROM api_keys k WHERE id = key_id AND role = 'admin' AND is_valid(k))
          AND NOT EXISTS (SELECT 1 FROM api_keys k WHERE id <> key_id AND role = 'admin' AND is_valid(k)) THEN
        RETURN 'last-admin-key';
    ELSIF after > INTERVAL '0' THEN
        UPDATE api_keys SET expires_at = LEAST(expires_at, clock_timestamp() + after)
         WHERE id = key_id AND revoked_at IS NULL;
    ELSE
        UPDATE api_keys SET revoked_at = clock_timestamp(), revoked_by = COALESCE(who, 'sql:' || session_user)
         WHERE id = key_id AND revoked_at IS NULL;
    END IF;
    RETURN 'revoked';
END $$;
