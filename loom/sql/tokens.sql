-- Fencing tokens: larger with each grant, also after a restore or a failover.

-- Raises the next token above all tokens ever given: by 2^32 above the greatest that this database knows, and at least
-- to 2^21 for each second of the clock. The second bound covers another restored copy of this database, which has
-- raised its tokens earlier and given more since. It ends in the year 2096, which also limits the effect of a wrong
-- clock. Run it by hand after restoring an old copy of the server's files, which the database cannot notice itself.
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

-- Identifies the database and the history that the sequence belongs to. A restore, a point-in-time recovery, an
-- asynchronous failover and a logical upgrade set the sequence back; each changes the database's system identifier, its
-- timeline, or the sequence's file.
-- IMMUTABLE: the identifier changes only while the server is down, and no cached plan survives that. To read it from
-- its file each time took 3 % of a claim.
CREATE OR REPLACE FUNCTION system_identifier() RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
    SELECT system_identifier FROM pg_control_system();
$$;

CREATE OR REPLACE FUNCTION fencing_identity_now() RETURNS text LANGUAGE sql AS $$
    SELECT system_identifier() || '/' || left(pg_walfile_name(pg_current_wal_lsn()), 8) || '/'
        || pg_relation_filepath('fencing_tokens');
$$;

-- Set when the schema is created, so that even a copy made before the first grant differs from the original.
UPDATE cluster SET fencing_identity = fencing_identity_now() WHERE fencing_identity IS NULL;

-- Raises the tokens if the identity has changed. Called before each grant, so also before the first in a new history.
CREATE OR REPLACE FUNCTION compare_fencing_identity() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    identity text := fencing_identity_now();
BEGIN
    IF (SELECT fencing_identity FROM cluster) IS DISTINCT FROM identity THEN
        -- If several sessions notice it at once, one passes the WHERE; the others wait for it here.
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
