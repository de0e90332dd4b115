-- Idempotency keys.

-- The stored answer to a request with this scope, if any. Until our transaction ends, other requests with the same
-- scope wait here (with `wait`) or get in_progress = true. The lock is taken first, and another statement then reads
-- with a new snapshot: a single statement would miss an answer that was committed in between.
CREATE OR REPLACE FUNCTION find_answer(wanted uuid, wait boolean)
RETURNS TABLE (in_progress boolean, fingerprint bytea, status integer, headers jsonb, body bytea)
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock(own_locks() + 1, pg_catalog.hashtext(wanted::text)) THEN
        IF NOT wait THEN
            RETURN QUERY SELECT true, NULL::bytea, NULL::integer, NULL::jsonb, NULL::bytea;
            RETURN;
        END IF;
        PERFORM pg_advisory_xact_lock(own_locks() + 1, pg_catalog.hashtext(wanted::text));
    END IF;
    RETURN QUERY
        SELECT false, k.fingerprint, k.status, k.headers, k.body FROM idempotency_keys k WHERE k.scope = wanted;
END $$;
