-- Bounds that the database checks, and pages of answers that end at a number of bytes.

-- The same as in loom/config.py.
CREATE OR REPLACE FUNCTION bound(name text) RETURNS integer LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE name WHEN 'entity' THEN 1048576 WHEN 'references' THEN 1000 WHEN 'shared_keys' THEN 1000
                     WHEN 'shared_value' THEN 65536 WHEN 'shared_values' THEN 1048576
                     WHEN 'dependants' THEN 10000 WHEN 'graph' THEN 50000 WHEN 'names' THEN 200 END;
$$;

-- The rows of a cursor, of one column of text, until there are `most_rows` or they have `most_bytes`; the first row in
-- any case. If more follow, the last row is null. It stops there: a list of 10,000 large rows is not even read.
CREATE OR REPLACE FUNCTION first_rows(of refcursor, most_rows integer, most_bytes bigint) RETURNS SETOF text
LANGUAGE plpgsql AS $$
DECLARE
    it text;
    n integer := 0;
    bytes bigint := 0;
BEGIN
    LOOP
        FETCH of INTO it;
        EXIT WHEN NOT FOUND;
        n := n + 1;
        bytes := bytes + octet_length(it);
        IF n > most_rows OR (n > 1 AND bytes > most_bytes) THEN
            RETURN NEXT NULL;
            EXIT;
        END IF;
        RETURN NEXT it;
    END LOOP;
    CLOSE of;
END $$;
