-- Bounds that the database checks.

-- The same as in loom/config.py.
CREATE OR REPLACE FUNCTION bound(name text) RETURNS integer LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE name WHEN 'dependants' THEN 10000 WHEN 'graph' THEN 50000 WHEN 'names' THEN 200 END;
$$;
