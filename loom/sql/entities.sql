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
CREATE TRIGGER a_provider_inserted BEFORE INSERT ON providers FOR EACH ROW EXECUTE FUNCTION on_provider_inserted();

-- Emptied by hand, too, a table leaves nothing behind that depends on its rows.
CREATE OR REPLACE FUNCTION on_entities_truncated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('DELETE FROM %I', TG_TABLE_NAME);
    RETURN NULL;
END $$;

DO $$
DECLARE
    kind text;
    tbl text;
    silent text[];
BEGIN
    FOR kind, tbl, silent IN VALUES
        ('project', 'projects', '{}'::text[]),
        ('provider', 'providers', '{}'),
        ('agent', 'agents', '{current_bead, open_claims, last_active, heartbeat_at}'),
        ('bead', 'beads', '{lease_seconds, lease_expires_at, claimed_at, not_before, open_blockers, open_children}'),
        ('config', 'config', '{}'),
        ('comment', 'comments', '{}')
    LOOP
        silent := silent || '{version, updated_at}';
        EXECUTE format('DROP TRIGGER IF EXISTS entity_updated ON %I', tbl);
        EXECUTE format('CREATE TRIGGER entity_updated BEFORE UPDATE OF %s ON %I FOR EACH ROW'
                       ' WHEN (OLD.version = NEW.version) EXECUTE FUNCTION on_entity_changed(%L, %L)',
                       (SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute
                         WHERE attrelid = tbl::regclass AND attnum > 0 AND NOT attisdropped AND attname <> ALL (silent)),
                       tbl, kind, silent);
        EXECUTE format('DROP TRIGGER IF EXISTS entity_created_or_deleted ON %I', tbl);
        EXECUTE format('CREATE TRIGGER entity_created_or_deleted AFTER INSERT OR DELETE ON %I FOR EACH ROW'
                       ' EXECUTE FUNCTION on_entity_changed(%L, %L)', tbl, kind, silent);
        EXECUTE format('DROP TRIGGER IF EXISTS entities_truncated ON %I', tbl);
        EXECUTE format('CREATE TRIGGER entities_truncated BEFORE TRUNCATE ON %I FOR EACH STATEMENT'
                       ' EXECUTE FUNCTION on_entities_truncated()', tbl);
    END LOOP;
END $$;

-- An entity as it is answered.
CREATE OR REPLACE FUNCTION as_json(t comments) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT to_jsonb(t) || CASE t.entity_type
        WHEN 'bead' THEN jsonb_build_object('bead_id', t.entity_id, 'edited', t.version > 1)
        ELSE jsonb_build_object('comment', t.content, 'timestamp', t.created_at) END;
$$;

CREATE OR REPLACE FUNCTION as_json(t projects) RETURNS jsonb LANGUAGE sql STABLE AS $$
    SELECT to_jsonb(t) || jsonb_build_object(
        'agents', ARRAY(SELECT id FROM agents WHERE project_id = t.id ORDER BY id),
        'comments', (SELECT COALESCE(jsonb_agg(as_json(c) ORDER BY c.created_at, c.id), '[]') FROM comments c
                      WHERE c.entity_type = 'project' AND c.entity_id = t.id));
$$;

CREATE OR REPLACE FUNCTION as_json(t providers) RETURNS jsonb LANGUAGE sql STABLE AS 'SELECT to_jsonb(t)';

CREATE OR REPLACE FUNCTION as_json(t agents) RETURNS jsonb LANGUAGE sql STABLE AS 'SELECT to_jsonb(t)';

CREATE OR REPLACE FUNCTION as_json(t config) RETURNS jsonb LANGUAGE sql STABLE AS 'SELECT to_jsonb(t)';

-- PL/pgSQL keeps the plans: an SQL function with a subquery is planned again at each call. json: in a claim, jsonb took 7 % more.
CREATE OR REPLACE FUNCTION as_json(t beads) RETURNS json LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF t.not_before <= clock_timestamp() THEN
        t.not_before := NULL;
    END IF;
    RETURN (SELECT row_to_json(bead) FROM (
        SELECT t.*, ARRAY(SELECT bead_id FROM bead_blockers WHERE blocker_id = t.id ORDER BY bead_id) AS blocks,
               ARRAY(SELECT id FROM beads WHERE parent = t.id ORDER BY id) AS children) AS bead);
END $$;

-- An id of our own for a new entity.
CREATE OR REPLACE FUNCTION new_entity_id(kind text, given jsonb) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    -- What can stand in a path, and is short enough for one.
    stem text := regexp_replace(left(regexp_replace(given ->> 'name', '[\u0001-\u001f\u007f-\u009f/\ufffd]', '-', 'g'), 150), '^\.{1,2}$', '-');
    made text;
    taken boolean;
BEGIN
    FOR n IN 1 .. 1000000 LOOP
        made := CASE kind
            WHEN 'bead' THEN COALESCE((SELECT bead_prefix FROM projects WHERE id = given ->> 'project_id'), 'bd') || '-'
                             || to_char(nextval('bead_numbers'), 'FM000000000000000000')
            WHEN 'project' THEN 'proj-' || nextval('project_numbers')
            WHEN 'agent' THEN 'agent-' || floor(extract(epoch FROM clock_timestamp())) || '-' || stem
                              || CASE WHEN n > 1 THEN '-' || n ELSE '' END
            WHEN 'provider' THEN stem || CASE WHEN n > 1 THEN '-' || n ELSE '' END
            ELSE md5(random()::text || clock_timestamp()::text)::uuid::text END;
        IF kind = 'bead' THEN
            made := regexp_replace(made, '-0{1,15}(\d{3,})$', '-\1');
        ELSIF kind IN ('agent', 'provider') THEN -- of a name, which another may have just now
            PERFORM pg_advisory_xact_lock(hashtextextended(kind || ':' || made, 0));
        END IF;
        EXECUTE format('SELECT EXISTS (SELECT 1 FROM %I WHERE id = $1)', kind || 's') INTO taken USING made;
        EXIT WHEN NOT taken;
    END LOOP;
    RETURN made;
END $$;

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
        (SELECT jsonb_object_agg(COALESCE(p.key, t.key), CASE WHEN p.key IS NULL THEN t.value ELSE merge_patch(t.value, p.value) END)
           FROM jsonb_each(target) AS t FULL JOIN jsonb_each(patch) AS p ON p.key = t.key
          WHERE p.value IS DISTINCT FROM 'null'), '{}');
END $$;

-- Whether the version of what is there, or null for nothing, meets a condition of RFC 9110: '*' is met by whatever is there,
-- an array by one of its versions.
CREATE OR REPLACE FUNCTION version_matches(version jsonb, condition jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT COALESCE(version IS NOT NULL AND (condition = '"*"' OR condition @> version), false);
$$;

-- Changes one entity, in one round trip: names, rows, decision, change and event. action: 'create', 'upsert', 'put' (what is
-- given replaces), 'patch' (objects are merged), 'delete'. if_match, if_none_match: conditions, see version_matches(), or
-- null; with merge, changes of other fields since the versions of if_match do no harm.
-- outcome: 'created', 'updated', 'deleted'; 'repeated' (the proxy sends the request once more, and its first time made the
-- current version, or the deletion); 'not-found', 'taken', 'stale' (by if_match; detail: who
-- changed which field), 'there' (by if_none_match).
CREATE OR REPLACE FUNCTION change_entity(
    kind text, key text, action text, patch jsonb, if_match jsonb, if_none_match jsonb, merge boolean, fences jsonb,
    OUT outcome text, OUT entity jsonb, OUT detail jsonb) LANGUAGE plpgsql AS $$
DECLARE
    tbl text := CASE kind WHEN 'config' THEN 'config' ELSE kind || 's' END;
    key_column text := CASE kind WHEN 'config' THEN 'key' ELSE 'id' END;
    own jsonb := patch - '{blocks, children}'::text[];
    blocks text[] := ARRAY(SELECT jsonb_array_elements_text(NULLIF(patch -> 'blocks', 'null')));
    children text[] := ARRAY(SELECT jsonb_array_elements_text(NULLIF(patch -> 'children', 'null')));
    others text[] := '{}';
    names text[];
    columns text;
    found jsonb;
    proxy_request text := NULLIF(current_setting('loom.proxy_request_id', true), '');
    links boolean;
    other text;
    turned boolean;
    moved boolean;
BEGIN
    IF key IS NULL THEN
        key := new_entity_id(kind, patch);
    END IF;
    IF patch ? 'blocks' OR (kind = 'bead' AND action = 'delete') THEN
        others := others || blocks || ARRAY(SELECT bead_id FROM bead_blockers WHERE blocker_id = key);
    END IF;
    IF patch ? 'children' OR (kind = 'bead' AND action = 'delete') THEN
        others := others || children || ARRAY(SELECT id FROM beads WHERE parent = key);
    END IF;
    names := ARRAY(SELECT kind || ':' || k FROM unnest(others || key) AS k);
    IF kind = 'bead' THEN
        names := names || ('agent:' || (patch ->> 'assigned_to'));
    ELSIF kind = 'agent' AND action = 'delete' THEN
        names := names || ARRAY(SELECT 'bead:' || id FROM beads WHERE assigned_to = key AND status IN ('open', 'in_progress', 'blocked'));
    ELSIF kind = 'provider' AND action = 'delete' THEN
        names := names || ARRAY(SELECT 'agent:' || id FROM agents WHERE provider_id = key);
    END IF;
    IF proxy_request IS NOT NULL THEN
        -- With the names, since the first time may still be under way. Before the grants that the request presents: one of
        -- them may have ended with what the first time did.
        PERFORM pg_advisory_xact_lock(hashtextextended(n, 0))
           FROM (SELECT DISTINCT u COLLATE "C" AS n FROM unnest(names) AS u WHERE u IS NOT NULL ORDER BY 1) AS sorted;
        IF (SELECT e.proxy_request_id = proxy_request AND (e.type = kind || '.deleted') = (action = 'delete') FROM events e
             WHERE e.entity_type = kind AND e.entity_id = key ORDER BY e.place DESC LIMIT 1) THEN
            outcome := 'repeated';
            EXECUTE format('SELECT as_json(t) FROM %I t WHERE %I = $1', tbl, key_column) INTO entity USING key;
            RETURN;
        END IF;
    END IF;
    PERFORM enter_names(names, fences);
    IF kind = 'bead' THEN
        links := action = 'delete' OR patch ?| '{blocked_by, parent, blocks, children}';
        IF links OR patch ? 'status' THEN
            PERFORM lock_bead_graph(links);
            turned := patch ? 'status' AND (SELECT b.status = 'closed' FROM beads b WHERE b.id = key) <> (patch ->> 'status' = 'closed');
            IF links OR turned THEN
                PERFORM lock_beads(key, others || (patch ->> 'parent')
                                        || ARRAY(SELECT jsonb_array_elements_text(NULLIF(patch -> 'blocked_by', 'null'))), turned);
            END IF;
        END IF;
    ELSIF kind = 'agent' AND (action = 'delete' OR patch ->> 'status' = 'dead') THEN
        -- Beads before agents, as in a claim.
        PERFORM 1 FROM beads WHERE assigned_to = key AND status IN ('open', 'in_progress', 'blocked') ORDER BY id FOR UPDATE;
    END IF;

    EXECUTE format('SELECT to_jsonb(t) FROM %I t WHERE %I = $1 FOR %s', tbl, key_column,
                   CASE action WHEN 'delete' THEN 'UPDATE' ELSE 'NO KEY UPDATE' END) INTO found USING key;
    -- As RFC 9110 has it: conditions only once the request would be served without them, and If-Match first.
    IF found IS NULL AND action NOT IN ('create', 'upsert') THEN
        outcome := 'not-found';
    ELSIF found IS NOT NULL AND action = 'create' THEN
        outcome := 'taken';
    ELSIF found IS NULL AND if_match IS NOT NULL THEN
        outcome := 'stale';
    ELSIF if_match IS NOT NULL AND NOT version_matches(found -> 'version', if_match) THEN
        detail := changes_since(kind, key, (SELECT max(v::bigint) FROM jsonb_array_elements_text(if_match) AS v),
                                (found ->> 'version')::bigint);
        IF NOT merge OR detail IS NULL OR detail ?| ARRAY(SELECT jsonb_object_keys(patch)) THEN
            outcome := 'stale';
        END IF;
    END IF;
    IF outcome IS NULL AND version_matches(found -> 'version', if_none_match) THEN
        outcome := 'there';
        detail := NULL;
    END IF;
    IF outcome IN ('stale', 'there') THEN
        EXECUTE format('SELECT as_json(t) FROM %I t WHERE %I = $1', tbl, key_column) INTO entity USING key;
    END IF;
    IF outcome IS NOT NULL THEN
        RETURN;
    END IF;

    IF action = 'delete' THEN
        EXECUTE format('DELETE FROM %I WHERE %I = $1', tbl, key_column) USING key;
        outcome := 'deleted';
        RETURN;
    END IF;
    IF found IS NULL THEN
        own := own || jsonb_build_object(key_column, key, 'created_at', clock_timestamp());
        own := own || jsonb_build_object('updated_at', own -> 'created_at');
    ELSIF action = 'patch' THEN
        own := (SELECT jsonb_object_agg(p.key, CASE jsonb_typeof(p.value) WHEN 'object' THEN merge_patch(found -> p.key, p.value)
                                               ELSE p.value END) FROM jsonb_each(own) AS p);
    END IF;
    IF others <> '{}' THEN
        PERFORM set_config('loom.cycles', 'later', true);
    END IF;
    SELECT string_agg(quote_ident(k), ', ') INTO columns FROM jsonb_object_keys(own) AS k;
    IF found IS NULL THEN
        EXECUTE format('INSERT INTO %1$I (%2$s) SELECT %2$s FROM jsonb_populate_record(NULL::%1$I, $1)', tbl, columns) USING own;
    ELSIF columns IS NOT NULL THEN
        EXECUTE format('UPDATE %1$I SET (%2$s) = (SELECT %2$s FROM jsonb_populate_record(NULL::%1$I, $1)) WHERE %3$I = $2',
                       tbl, columns, key_column) USING own, key;
    END IF;

    FOREACH other IN ARRAY ARRAY(SELECT DISTINCT o COLLATE "C" FROM unnest(others) AS o ORDER BY 1) LOOP
        IF other = ANY (blocks || children) AND NOT EXISTS (SELECT 1 FROM beads WHERE id = other) THEN
            PERFORM raise_unknown(CASE WHEN other = ANY (blocks) THEN 'blocks' ELSE 'children' END, other);
        END IF;
        SELECT patch ? 'blocks' AND (key = ANY (b.blocked_by)) <> (other = ANY (blocks)),
               patch ? 'children' AND (b.parent IS NOT DISTINCT FROM key) <> (other = ANY (children))
          INTO turned, moved FROM beads b WHERE b.id = other;
        IF turned OR moved THEN
            UPDATE beads SET
                blocked_by = CASE WHEN NOT turned THEN blocked_by WHEN other = ANY (blocks) THEN blocked_by || key
                                  ELSE array_remove(blocked_by, key) END,
                parent = CASE WHEN NOT moved THEN parent WHEN other = ANY (children) THEN key END
             WHERE id = other;
        END IF;
    END LOOP;
    IF others <> '{}' THEN
        PERFORM set_config('loom.cycles', '', true);
        PERFORM check_bead_cycle(key);
    END IF;
    outcome := CASE WHEN found IS NULL THEN 'created' ELSE 'updated' END;
    EXECUTE format('SELECT as_json(t) FROM %I t WHERE %I = $1', tbl, key_column) INTO entity USING key;
END $$;
