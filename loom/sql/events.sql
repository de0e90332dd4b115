-- Events: one per version of an entity, in the order in which readers see them.

-- Numbers committed events in the order of insertion, at most `most` at a time; returns how many. Each reader calls it
-- first, in a transaction that has not written; it does nothing if another session is numbering. The order matters: the
-- lock is taken first, so that each later statement sees what all earlier holders of the lock have committed. A later
-- version of an entity is visible only together with the earlier ones.
CREATE OR REPLACE FUNCTION number_events(most integer DEFAULT 10000)
RETURNS integer LANGUAGE plpgsql SET jit = off AS $$
DECLARE
    set_back boolean;
    greatest_id bigint;
    oldest_running bigint;
    n integer;
BEGIN
    -- Our xid must be greater than that of each transaction that has inserted into a gap; so it must be assigned now. A
    -- snapshot's xmax cannot be used, since a running transaction may have that xid.
    IF txid_current_if_assigned() IS NOT NULL OR NOT pg_try_advisory_xact_lock(own_locks(), 1) THEN
        RETURN 0;
    END IF;
    set_back := (SELECT fencing_identity FROM cluster) IS DISTINCT FROM fencing_identity_now();
    IF set_back THEN
        PERFORM compare_fencing_identity(); -- raises numbers that must not repeat, including the ids of events
        UPDATE event_gaps SET xid = NULL; -- they may come from another server
    END IF;
    SELECT GREATEST((SELECT max(id) FROM event_numbers), events_forgotten, fencing_base) INTO greatest_id FROM cluster;
    oldest_running := txid_snapshot_xmin(txid_current_snapshot());
    WITH fresh AS MATERIALIZED (
        SELECT e.place, g.first, g.last FROM event_gaps g
         CROSS JOIN LATERAL (
             SELECT place FROM events WHERE place BETWEEN g.first AND g.last ORDER BY place LIMIT most) AS e
         ORDER BY e.place LIMIT most),
    numbered AS (
        INSERT INTO event_numbers (id, place) SELECT greatest_id + row_number() OVER (ORDER BY place), place FROM fresh
            ON CONFLICT (place) DO NOTHING), -- rows may have been restored without event_gaps
    filled AS (
        DELETE FROM event_gaps g USING (SELECT DISTINCT first, last FROM fresh) AS f
         WHERE (g.first, g.last) = (f.first, f.last)),
    split AS (
        INSERT INTO event_gaps
            SELECT r.first, r.last, CASE WHEN NOT set_back THEN txid_current() END
              FROM (SELECT COALESCE(lag(place) OVER (PARTITION BY first, last ORDER BY place) + 1, first) AS first,
                           place - 1 AS last
                      FROM fresh
                    UNION ALL SELECT max(place) + 1, last FROM fresh GROUP BY first, last) AS r
             WHERE r.first <= r.last)
    SELECT count(*) INTO n FROM fresh;
    IF n < most AND NOT set_back THEN
        UPDATE event_gaps SET xid = txid_current() WHERE xid IS NULL AND last < 9223372036854775807;
        -- All transactions that could insert into these gaps had ended before the numbering read them.
        DELETE FROM event_gaps WHERE xid <= oldest_running AND last < 9223372036854775807;
    END IF;
    RETURN n;
END $$;

-- Remembers the greatest id of deleted events (by retention or by hand), so that no id is given again.
CREATE OR REPLACE FUNCTION on_events_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    forgotten bigint;
BEGIN
    WITH gone AS (DELETE FROM event_numbers n USING deleted d WHERE n.place = d.place RETURNING n.id)
    SELECT max(id) INTO forgotten FROM gone;
    UPDATE cluster SET events_forgotten = forgotten WHERE events_forgotten < forgotten;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS events_deleted ON events;
CREATE TRIGGER events_deleted AFTER DELETE ON events REFERENCING OLD TABLE AS deleted
    FOR EACH STATEMENT EXECUTE FUNCTION on_events_deleted();

CREATE OR REPLACE FUNCTION on_events_truncated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE cluster SET events_forgotten = GREATEST(events_forgotten, (SELECT max(id) FROM event_numbers));
    TRUNCATE event_numbers, event_gaps;
    INSERT INTO event_gaps VALUES (1, 9223372036854775807);
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS events_truncated ON events;
CREATE TRIGGER events_truncated BEFORE TRUNCATE ON events FOR EACH STATEMENT EXECUTE FUNCTION on_events_truncated();

-- Sets who acts in this transaction, for its events. proxy_request: the id that the proxy gave this request
-- (Loom-Proxy-Request-ID); no client can choose it. A proxy that lost the answer to a write sends the write again with
-- the same id. If that id is found in an event or a grant, the request gets its first answer again. settings: those in
-- force in the instance, for setting().
CREATE OR REPLACE FUNCTION acting_as(actor text, instance uuid, request text, proxy_request text, settings json)
RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('loom.actor', COALESCE(actor, ''), true),
            set_config('loom.instance_id', COALESCE(instance::text, ''), true),
            set_config('loom.request_id', COALESCE(request, ''), true),
            set_config('loom.proxy_request_id', COALESCE(proxy_request, ''), true),
            set_config('loom.settings', settings::text, true);
END $$;

-- Whether this transaction is an import (loom/transfer), which writes thousands of rows by a statement, with their
-- events, and checks references before: the triggers on inserted rows leave them alone. Inlined by the planner.
CREATE OR REPLACE FUNCTION importing() RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT COALESCE(current_setting('loom.importing', true) = 'on', false);
$$;

-- The type of an event; the types are those of the original.
CREATE OR REPLACE FUNCTION event_type(kind text, op text, was jsonb, becomes jsonb)
RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT kind || '.' || CASE
        WHEN op = 'DELETE' THEN 'deleted'
        WHEN kind = 'config' THEN 'updated'
        WHEN op = 'INSERT' THEN
            CASE kind WHEN 'agent' THEN 'spawned' WHEN 'provider' THEN 'registered' ELSE 'created' END
        WHEN kind = 'bead' AND becomes ->> 'status' = 'closed' AND was ->> 'status' <> 'closed' THEN 'completed'
        WHEN kind = 'bead' AND becomes ->> 'assigned_to' <> COALESCE(was ->> 'assigned_to', '') THEN 'assigned'
        WHEN kind IN ('bead', 'agent') AND becomes ->> 'status' <> was ->> 'status' THEN 'status_change'
        ELSE 'updated' END;
$$;

-- The event of a version: the one way in which events are written. type: the kind of entity, a dot, and what happened.
CREATE OR REPLACE FUNCTION write_event(
    type text, entity text, version bigint, project text, t timestamptz, changes jsonb)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO events (type, entity_type, entity_id, version, project_id, timestamp, changes)
    VALUES (type, split_part(type, '.', 1), entity, version, project, t, changes);
END $$;

-- The merge patch (RFC 7396) that turns one value into another: an event holds only the keys of an object that changed.
CREATE OR REPLACE FUNCTION patch_between(was jsonb, becomes jsonb) RETURNS jsonb LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF jsonb_typeof(was) IS DISTINCT FROM 'object' OR jsonb_typeof(becomes) <> 'object' THEN
        RETURN becomes;
    END IF;
    RETURN COALESCE(
        (SELECT jsonb_object_agg(COALESCE(b.key, w.key),
                                 CASE WHEN b.key IS NULL THEN 'null' ELSE patch_between(w.value, b.value) END)
           FROM jsonb_each(was) AS w FULL JOIN jsonb_each(becomes) AS b ON b.key = w.key
          WHERE w.value IS DISTINCT FROM b.value), '{}');
END $$;

-- Raises L0006 for an entity that has grown beyond the bound. One that is larger already may get smaller. Measured as
-- it is answered: JSONB can take a thirtieth of that, for numbers such as 1e300.
CREATE OR REPLACE FUNCTION refuse_too_large(kind text, key text, was jsonb, becomes jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    size integer;
BEGIN
    IF pg_column_size(becomes) > bound('entity') / 30 THEN
        size := octet_length(becomes::text);
        IF size > GREATEST(bound('entity'), octet_length(was::text)) THEN
            RAISE EXCEPTION '% % would have % bytes', kind, key, size USING ERRCODE = 'L0006',
                DETAIL = jsonb_build_object('kind', kind, 'id', key, 'size', size, 'most', bound('entity'));
        END IF;
    END IF;
END $$;

-- Writes the event of a change: of an INSERT, `was` is empty; of a DELETE, `becomes`; both with times in UTC. silent:
-- columns that are in no event.
CREATE OR REPLACE FUNCTION note_change(kind text, op text, was jsonb, becomes jsonb, silent text[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    entity jsonb := was || becomes;
    key text := COALESCE(entity ->> 'id', entity ->> 'key');
    changes jsonb;
BEGIN
    SELECT COALESCE(jsonb_object_agg(
               e.key, CASE kind WHEN 'config' THEN e.value ELSE patch_between(was -> e.key, e.value) END), '{}')
      INTO changes FROM jsonb_each(becomes) AS e
     WHERE e.value IS DISTINCT FROM COALESCE(was -> e.key, 'null') AND e.key <> ALL (silent);
    -- Not for those that Loom sets by itself, so that an entity that is too large already can be closed.
    IF changes - '{status, assigned_to, parent, provider_id, project_id, closed_at}'::text[] <> '{}' THEN
        PERFORM refuse_too_large(kind, key, was - silent, becomes - silent);
    END IF;
    PERFORM write_event(
        event_type(kind, op, was, becomes), key,
        (entity ->> 'version')::bigint + (op = 'DELETE')::int,
        CASE kind WHEN 'project' THEN entity ->> 'id' ELSE entity ->> 'project_id' END,
        CASE op WHEN 'DELETE' THEN clock_timestamp() ELSE (entity ->> 'updated_at')::timestamptz END, changes);
END $$;

-- Sets the new version of a changed entity and writes its event. Arguments: the kind, and the columns that are in no
-- event.
CREATE OR REPLACE FUNCTION on_entity_changed() RETURNS trigger LANGUAGE plpgsql SET timezone = 'UTC' AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        NEW.version := OLD.version + 1;
        NEW.updated_at := clock_timestamp();
    END IF;
    PERFORM note_change(TG_ARGV[0], TG_OP, CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) ELSE '{}' END,
                        CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) ELSE '{}' END, TG_ARGV[1]::text[]);
    RETURN NEW;
END $$;

-- The fields of an entity that have changed since a version, with who changed them; NULL if those events were removed.
CREATE OR REPLACE FUNCTION changes_since(kind text, key text, since bigint, until bigint) RETURNS jsonb
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN count(DISTINCT e.version) = until - since
           THEN COALESCE(jsonb_object_agg(c.field, e.actor ORDER BY e.place) FILTER (WHERE c.field IS NOT NULL), '{}')
           END
      FROM events e LEFT JOIN LATERAL
           jsonb_object_keys(e.changes - '{claim_ended, reason, imported_from}'::text[]) AS c (field) ON true
     WHERE e.entity_type = kind AND e.entity_id = key AND e.version > since AND e.version <= until
       AND e.place > COALESCE( -- its creation: an earlier entity may have had the same id
           (SELECT max(f.place) FROM events f WHERE f.entity_type = kind AND f.entity_id = key AND f.version = 1), 0);
$$;
