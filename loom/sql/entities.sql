-- What projects, providers, agents, beads, comments and config have in common.

-- A reference to what is not there.
CREATE OR REPLACE FUNCTION raise_unknown(field text, value text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% % does not exist', field, value
        USING ERRCODE = 'L0004', DETAIL = jsonb_build_object('field', field, 'value', value);
END $$;

CREATE OR REPLACE FUNCTION on_provider_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.name := COALESCE(NEW.name, NEW.id);
    IF NEW.requires_key AND NEW.key_id = '' THEN
        NEW.key_id := NEW.id || '-api-key';
    END IF;
    RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS a_provider_inserted ON providers;
CREATE TRIGGER a_provider_inserted BEFORE INSERT ON providers FOR EACH ROW WHEN (NOT importing())
    EXECUTE FUNCTION on_provider_inserted();

-- Emptied by hand, too, a table leaves nothing behind that depends on its rows.
CREATE OR REPLACE FUNCTION on_entities_truncated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('DELETE FROM %I', TG_TABLE_NAME);
    RETURN NULL;
END $$;

-- Creates the triggers that write versions and events. silent: columns whose change makes neither. on_update: what
-- BEFORE UPDATE calls.
CREATE OR REPLACE FUNCTION create_entity_triggers(
    kind text, tbl regclass, silent text[] DEFAULT '{}', on_update text DEFAULT 'on_entity_changed') RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    columns text;
BEGIN
    silent := silent || '{version, updated_at}';
    SELECT string_agg(quote_ident(attname), ', ') INTO columns FROM pg_attribute
     WHERE attrelid = tbl AND attnum > 0 AND NOT attisdropped AND attname <> ALL (silent);
    silent := array_remove(silent, 'not_before'); -- it is in the events of other changes
    EXECUTE format('DROP TRIGGER IF EXISTS entity_updated ON %s', tbl);
    EXECUTE format('CREATE TRIGGER entity_updated BEFORE UPDATE OF %s ON %s FOR EACH ROW'
                   ' WHEN (OLD.version = NEW.version) EXECUTE FUNCTION %I(%L, %L)',
                   columns, tbl, on_update, kind, silent);
    EXECUTE format('DROP TRIGGER IF EXISTS entity_created_or_deleted ON %s', tbl);
    EXECUTE format('CREATE TRIGGER entity_created_or_deleted AFTER INSERT OR DELETE ON %s FOR EACH ROW'
                   ' WHEN (NOT importing()) EXECUTE FUNCTION on_entity_changed(%L, %L)', tbl, kind, silent);
    EXECUTE format('DROP TRIGGER IF EXISTS entities_truncated ON %s', tbl);
    EXECUTE format('CREATE TRIGGER entities_truncated BEFORE TRUNCATE ON %s FOR EACH STATEMENT'
                   ' EXECUTE FUNCTION on_entities_truncated()', tbl);
END $$;
DO $$
BEGIN
    PERFORM create_entity_triggers('project', 'projects'), create_entity_triggers('provider', 'providers'),
            create_entity_triggers('agent', 'agents', '{current_bead, open_claims, last_active, heartbeat_at}'),
            create_entity_triggers('config', 'config'), create_entity_triggers('comment', 'comments');
END $$;

-- An entity as it is answered.
CREATE OR REPLACE FUNCTION as_json(t comments) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT CASE t.entity_type
        WHEN 'bead' THEN to_jsonb(t) || jsonb_build_object('bead_id', t.entity_id, 'edited', t.version > 1)
        ELSE to_jsonb(t) - 'content' || jsonb_build_object('comment', t.content, 'timestamp', t.created_at) END;
$$;

CREATE OR REPLACE FUNCTION as_json(t projects) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT to_jsonb(t)
           || jsonb_build_object('agents', ARRAY(SELECT id FROM agents WHERE project_id = t.id ORDER BY id));
$$;

CREATE OR REPLACE FUNCTION as_json(t providers) RETURNS jsonb LANGUAGE sql STABLE AS 'SELECT to_jsonb(t)';

CREATE OR REPLACE FUNCTION as_json(t agents) RETURNS jsonb LANGUAGE sql STABLE AS 'SELECT to_jsonb(t)';

CREATE OR REPLACE FUNCTION as_json(t config) RETURNS jsonb LANGUAGE sql STABLE AS 'SELECT to_jsonb(t)';

-- PL/pgSQL keeps the plans: an SQL function with a subquery is planned again at each call. json: jsonb took 7 % more of
-- a claim.
CREATE OR REPLACE FUNCTION as_json(t beads) RETURNS json LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF t.not_before <= clock_timestamp() THEN
        t.not_before := NULL;
    END IF;
    RETURN (SELECT row_to_json(bead) FROM (
        SELECT t.*, ARRAY(SELECT bead_id FROM bead_blockers WHERE blocker_id = t.id ORDER BY bead_id) AS blocks,
               ARRAY(SELECT id FROM beads WHERE parent = t.id ORDER BY id) AS children) AS bead);
END $$;

-- A name as a part of an id: short, and without what cannot stand in a path.
CREATE OR REPLACE FUNCTION id_of_name(name text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT regexp_replace(left(regexp_replace(name, '[\u0001-\u001f\u007f-\u009f/\ufffd]', '-', 'g'), 150),
                          '^\.{1,2}$', '-');
$$;

-- RFC 7396: what a JSON merge patch makes of a value.
CREATE OR REPLACE FUNCTION merge_patch(target jsonb, patch jsonb) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF jsonb_typeof(patch) <> 'object' THEN
        RETURN patch;
    END IF;
    IF target IS NULL OR jsonb_typeof(target) <> 'object' THEN
        target := '{}';
    END IF;
    RETURN COALESCE(
        (SELECT jsonb_object_agg(COALESCE(p.key, t.key),
                                 CASE WHEN p.key IS NULL THEN t.value ELSE merge_patch(t.value, p.value) END)
           FROM jsonb_each(target) AS t FULL JOIN jsonb_each(patch) AS p ON p.key = t.key
          WHERE p.value IS DISTINCT FROM 'null'), '{}');
END $$;

-- A change of one entity is one message of several statements, composed in loom/state/entities.py:
--   1. enter_change() takes the automatic locks and checks the grants that the request presents;
--   2. check_change() compares the conditions with the version of the row, which is locked now;
--   3. a plain INSERT, UPDATE or DELETE ... WHERE id = entered();
--   4. the entity is answered, or the refusal.
-- Each statement sees what was committed while those before it waited. A refusal is a value (see loom/refusals.py):
-- from then on entered() is null, and the other statements do nothing. PUT and PATCH without conditions skip the check.

-- The key of the entity that is being changed; null once the change was refused.
CREATE OR REPLACE FUNCTION entered() RETURNS text LANGUAGE sql STABLE AS $$
    SELECT NULLIF(current_setting('loom.entered', true), '');
$$;

-- Why the change was refused: outcome and detail; null if it was not.
CREATE OR REPLACE FUNCTION refusal() RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN entered() IS NULL THEN NULLIF(current_setting('loom.refusal', true), '')::jsonb END;
$$;

CREATE OR REPLACE FUNCTION refuse_change(outcome text, detail jsonb DEFAULT NULL) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('loom.entered', '', true),
            set_config('loom.refusal', jsonb_build_object('outcome', outcome, 'detail', detail)::text, true);
END $$;

-- Begins a change, and locks the names of the entity and of others that change with it. Refuses with 'repeated' when
-- the proxy sends a request again that made the current version, or the deletion. Raises L0003 (lock-held), L0001
-- (lock-lost).
CREATE OR REPLACE FUNCTION enter_change(kind text, key text, names text[], deletes boolean, fences jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    proxy_request text := NULLIF(current_setting('loom.proxy_request_id', true), '');
BEGIN
    PERFORM set_config('loom.entered', key, true);
    names := names || (kind || ':' || key);
    IF proxy_request IS NOT NULL THEN
        -- With the names locked, since the first time may still be under way. Before the grants that the request
        -- presents: one of them may have ended with what the first time did.
        PERFORM pg_advisory_xact_lock(name_key(n))
           FROM (SELECT DISTINCT u COLLATE "C" AS n FROM unnest(names) AS u WHERE u IS NOT NULL ORDER BY 1) AS sorted;
        IF (SELECT e.proxy_request_id = proxy_request AND (e.type = kind || '.deleted') = deletes FROM events e
             WHERE e.entity_type = kind AND e.entity_id = key ORDER BY e.place DESC LIMIT 1) THEN
            PERFORM refuse_change('repeated');
            RETURN;
        END IF;
    END IF;
    PERFORM enter_names(names, fences);
END $$;

-- Whether a version meets a condition of RFC 9110: any version meets '*'; an array must contain it.
CREATE OR REPLACE FUNCTION version_matches(version bigint, condition jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT COALESCE(version IS NOT NULL AND (condition = '"*"' OR condition @> to_jsonb(version)), false);
$$;

-- Decides on a change by the entity's version, which is null when there is no such entity. As RFC 9110 has it:
-- conditions only once the request would be served without them, and If-Match first. action: as in
-- loom/state/entities.py. merges: the fields of a change that may pass over later versions in which others changed
-- other fields; else null. Refuses with 'not-found', 'taken', 'stale' (by if_match; detail: who changed which field),
-- 'there' (by if_none_match).
CREATE OR REPLACE FUNCTION check_change(
    kind text, action text, version bigint, if_match jsonb, if_none_match jsonb, merges text[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    changed jsonb;
BEGIN
    IF entered() IS NULL THEN
        RETURN;
    ELSIF version IS NULL AND action NOT IN ('create', 'upsert') THEN
        PERFORM refuse_change('not-found');
    ELSIF version IS NOT NULL AND action = 'create' THEN
        PERFORM refuse_change('taken', jsonb_build_object('id', entered()));
    ELSIF version IS NULL AND if_match IS NOT NULL THEN
        PERFORM refuse_change('stale');
    ELSIF if_match IS NOT NULL AND NOT version_matches(version, if_match) THEN
        SELECT changes_since(kind, entered(), max(v::bigint), version) INTO changed
          FROM jsonb_array_elements_text(if_match) AS v;
        IF merges IS NULL OR changed IS NULL OR changed ?| merges THEN
            PERFORM refuse_change('stale', changed);
        END IF;
    END IF;
    IF if_none_match IS NOT NULL AND entered() IS NOT NULL AND version_matches(version, if_none_match) THEN
        PERFORM refuse_change('there');
    END IF;
END $$;
