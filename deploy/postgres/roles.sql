-- Roles of a database of Loom, with no more rights than each needs. Run it once, as a superuser, in the new database:
--
--     createdb loom && psql -d loom -f deploy/postgres/roles.sql
--     psql -d loom -c '\password loom_owner' -c '\password loom_app' -c '\password loom_reader'
--
-- loom_owner   owns the tables and functions: for `loom migrate`, before the first start and at upgrades.
-- loom_app     the instances: reads and writes rows. It cannot change what is history.
-- loom_reader  people who look: reads everything but stored answers and keys.
--
-- loom/sql/privileges.sql grants what they may do, whenever the schema is applied. It may be run again.

DO $$
DECLARE
    role text;
BEGIN
    FOREACH role IN ARRAY '{loom_owner, loom_app, loom_reader}'::text[] LOOP
        IF to_regrole(role) IS NULL THEN
            EXECUTE format('CREATE ROLE %I LOGIN', role);
        END IF;
        EXECUTE format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), role);
        EXECUTE format('GRANT USAGE ON SCHEMA public TO %I', role);
        -- A refused value could be a secret: the server's log has neither the statement nor the detail of an error.
        EXECUTE format('ALTER ROLE %I IN DATABASE %I SET log_min_error_statement = panic', role, current_database());
        EXECUTE format('ALTER ROLE %I IN DATABASE %I SET log_error_verbosity = terse', role, current_database());
        -- A session that forgets its transaction keeps vacuum from cleaning.
        EXECUTE format('ALTER ROLE %I IN DATABASE %I SET idle_in_transaction_session_timeout = ''60s''',
                       role, current_database());
    END LOOP;
    -- Else every role of the server may connect, and before PostgreSQL 15 create functions that Loom's would call.
    EXECUTE format('REVOKE CONNECT, TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
END $$;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT CREATE ON SCHEMA public TO loom_owner;
ALTER ROLE loom_reader SET default_transaction_read_only = on;
