-- What other roles may do: those of deploy/postgres/roles.sql, where they exist and another role owns the tables.

DO $$
DECLARE
    place text := quote_ident(current_schema());
    history text := 'events, event_numbers, grants, claims, request_logs'; -- written once; retention deletes the oldest
    days text := (SELECT string_agg(inhrelid::regclass::text, ', ') FROM pg_inherits
                   WHERE inhparent = 'request_logs'::regclass);
BEGIN
    -- They run with the rights of the owner; nobody else may call them where a table or function could be put in front.
    REVOKE EXECUTE ON FUNCTION open_request_logs(interval, bigint), trim_request_logs(interval, bigint) FROM PUBLIC;
    IF to_regrole('loom_app') IS NOT NULL AND current_user <> 'loom_app' THEN
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA %s TO loom_app', place);
        EXECUTE format('GRANT USAGE, SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA %s TO loom_app', place);
        EXECUTE format('REVOKE UPDATE ON %s FROM loom_app', history);
        IF days IS NOT NULL THEN
            EXECUTE format('REVOKE ALL ON %s FROM loom_app', days); -- reached through request_logs alone
        END IF;
        REVOKE INSERT, UPDATE, DELETE ON schema_version FROM loom_app;
        GRANT EXECUTE ON FUNCTION open_request_logs(interval, bigint), trim_request_logs(interval, bigint) TO loom_app;
        -- Retention skips locked rows (FOR UPDATE SKIP LOCKED), for which PostgreSQL asks for one column.
        GRANT UPDATE (proxy_request_id) ON grants TO loom_app;
        GRANT UPDATE (reason) ON claims TO loom_app;
    END IF;
    IF to_regrole('loom_reader') IS NOT NULL AND current_user <> 'loom_reader' THEN
        EXECUTE format('GRANT SELECT ON ALL TABLES IN SCHEMA %s TO loom_reader', place);
        REVOKE SELECT ON idempotency_keys, api_keys FROM loom_reader;
        GRANT SELECT (id, principal, role, note, created_at, created_by, expires_at, revoked_at, revoked_by,
                      last_used_at) ON api_keys TO loom_reader; -- not the hash
    END IF;
END $$;
