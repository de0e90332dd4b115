-- Shared configuration.

CREATE OR REPLACE FUNCTION on_config_written() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.value := COALESCE(NEW.value, 'null'); -- JSON's null is a value, too
    IF NOT answerable(NEW.value) THEN
        RAISE EXCEPTION 'holds a number beyond 1.797e308, or is nested deeper than 100 levels'
            USING ERRCODE = '23514', COLUMN = NEW.key;
    ELSIF octet_length(NEW.value::text) > bound('shared_value') THEN -- as it is answered: 1e300 has 301 digits there
        RAISE EXCEPTION 'must have at most 64 KiB' USING ERRCODE = '23514', COLUMN = NEW.key;
    END IF;
    NEW.updated_by := COALESCE(NULLIF(current_setting('loom.actor', true), ''), session_user);
    RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS a_config_written ON config;
CREATE TRIGGER a_config_written BEFORE INSERT OR UPDATE OF value ON config FOR EACH ROW
    WHEN (NOT importing()) EXECUTE FUNCTION on_config_written();

CREATE OR REPLACE FUNCTION on_config_grown() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- One at a time, until each has committed: else two would count without each other.
    PERFORM pg_advisory_xact_lock(own_locks(), 3);
    IF (SELECT count(*) > bound('shared_keys') OR sum(octet_length(value::text)) > bound('shared_values')
          FROM config) THEN
        RAISE EXCEPTION 'no room: all keys together are at most 1000, and their values 1 MiB'
            USING ERRCODE = '23514', COLUMN = 'value';
    END IF;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS config_grown ON config;
CREATE TRIGGER config_grown AFTER INSERT OR UPDATE ON config FOR EACH STATEMENT EXECUTE FUNCTION on_config_grown();

-- A setting as it is shared, if the shared value is valid; else its default. Ranges and defaults are those of
-- loom/config.py.
CREATE OR REPLACE FUNCTION shared_setting(name text) RETURNS integer LANGUAGE sql STABLE AS $$
    SELECT COALESCE((SELECT c.value::text::integer FROM config c
                      WHERE c.key = s.key
                        AND CASE WHEN c.value::text ~ '^[0-9]{1,5}$'
                                 THEN c.value::text::integer BETWEEN s.low AND s.high END),
                    s.fallback)
      FROM (VALUES ('agents.max_concurrent', 1, 1000, 20), ('agents.dead_after', 10, 86400, 120),
                   ('beads.max_failures', 1, 1000, 5), ('beads.max_attempts', 1, 1000, 20))
           AS s (key, low, high, fallback)
     WHERE s.key = name;
$$;

-- A setting in force: that of the instance that acts, see acting_as(); by hand in psql, where no instance acts, the
-- shared one. Inlined by the planner.
CREATE OR REPLACE FUNCTION setting(name text) RETURNS integer LANGUAGE sql STABLE AS $$
    SELECT COALESCE((NULLIF(current_setting('loom.settings', true), '')::json ->> name)::integer, shared_setting(name));
$$;

-- Sets shared values, key -> value, all or none; one that is as it was makes no version.
CREATE OR REPLACE FUNCTION share_values(given jsonb, fences jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM enter_names(ARRAY(SELECT 'config:' || k FROM jsonb_object_keys(given) AS k), fences);
    INSERT INTO config AS c (key, value) SELECT g.key, g.value FROM jsonb_each(given) AS g ORDER BY g.key COLLATE "C"
        ON CONFLICT (key) DO UPDATE SET value = excluded.value WHERE c.value <> excluded.value;
END $$;
