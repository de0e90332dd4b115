-- What the roles of deploy/postgres/roles.sql may do, where they exist and another role owns the tables.

DO $$
DECLARE
    place text := quote_ident(current_schema());
    history text := 'events, event_numbers, grants, claims'; -- what is written once; retention deletes the oldest
BEGIN
    IF to_regrole('loom_app') IS NOT NULL AND current_user <> 'loom_app' THEN
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA %s TO loom_app', place);
        EXECUTE format('GRANT USAGE, SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA %s TO loom_app', place);
        EXECUTE format('REVOKE UPDATE ON %s FROM loom_app', history);
        REVOKE INSERT, UPDATE, DELETE ON schema_version FROM loom_app;
        -- Retention skips locked rows (FOR UPDATE SKIP LOCKED), for which PostgreSQL asks for one column.
        GRANT UPDATE (proxy_request_id) ON grants TO loom_app;
        GRANT UPDATE (reason) ON claims TO loom_app;
    END IF;
    IF to_regrole('loom_reader') IS NOT NULL AND current_user <> 'loom_reader' THEN
        EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA %s TO loom_reader', place);
        REVOKE SELECT ON idempotency_keys FROM loom_reader;
    END IF;
END $$;
