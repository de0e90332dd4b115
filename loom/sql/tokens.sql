-- Fencing tokens: larger with each grant, also over a restore or a failover.

-- Lifts the tokens above every one ever given: 2^32 beyond the greatest that this database remembers, and beyond what
-- another copy of the same past, which did the same before, can have given since: 2^21 for every second of the clock
-- (until the year 2096, which also bounds what a wrong clock does). Run it by hand after bringing back an old copy of
-- the server's files, which nothing inside can notice.
CREATE OR REPLACE FUNCTION raise_fencing_tokens() RETURNS bigint LANGUAGE sql AS $$
    UPDATE cluster SET fencing_base = GREATEST(
        (LEAST(extract(epoch FROM clock_timestamp()), 4e9) * 2097152)::bigint,
        4294967296 + GREATEST(
               fencing_base,
               (SELECT last_value FROM fencing_tokens),
               (SELECT max(fencing_token) FROM grants),
               (SELECT max(fencing_token) FROM distributed_locks)));
    SELECT setval('fencing_tokens', fencing_base) FROM cluster;
$$;

-- Which history of which database the sequence belongs to. A restore, a point-in-time recovery, an asynchronous failover
-- and a logical upgrade set it back; each gives the database another system identifier, another timeline or the sequence
-- another file.
-- IMMUTABLE: it changes only while the server is down, and no plan that holds it survives that. Read each time, from a file, it
-- was 3 % of a claim.
CREATE OR REPLACE FUNCTION system_identifier() RETURNS bigint LANGUAGE sql IMMUTABLE AS 'SELECT system_identifier FROM pg_control_system()';

CREATE OR REPLACE FUNCTION fencing_identity_now() RETURNS text LANGUAGE sql AS $$
    SELECT system_identifier() || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8) || '/' || pg_relation_filepath('fencing_tokens');
$$;

-- From the beginning, so that a copy made before the first grant is told from the original, too.
UPDATE cluster SET fencing_identity = fencing_identity_now() WHERE fencing_identity IS NULL;

-- Lifts the tokens when this is another history than the one before, and so before the first grant in it.
CREATE OR REPLACE FUNCTION compare_fencing_identity() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    identity text := fencing_identity_now();
BEGIN
    IF (SELECT fencing_identity FROM cluster) IS DISTINCT FROM identity THEN
        -- Of several that notice at once, one passes the WHERE; the others wait for it here.
        INSERT INTO cluster AS c (fencing_identity) VALUES (identity)
            ON CONFLICT (only_row) DO UPDATE SET fencing_identity = identity
                WHERE c.fencing_identity IS DISTINCT FROM identity;
        IF FOUND THEN
            PERFORM raise_fencing_tokens();
        END IF;
    END IF;
END $$;

-- Draws the token of a new grant; the caller holds the lock's name, so that an older number cannot be granted after a
-- newer one.
CREATE OR REPLACE FUNCTION next_fencing_token() RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
    PERFORM compare_fencing_identity();
    RETURN nextval('fencing_tokens');
END $$;
