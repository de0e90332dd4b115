-- The partitions of request_logs: made ahead, and removed with age or size. With the rights of the schema's owner, so
-- that a role that may only write rows can call these functions.

-- The partition of a day, which begins at midnight in UTC.
CREATE OR REPLACE FUNCTION request_logs_of(day date) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT 'request_logs_' || to_char(day, 'YYYYMMDD');
$$;

-- Makes the partitions that are missing, from the day of the oldest row that is about to be written until the day after
-- tomorrow. Returns the clock; null if the partition of today alone has `most_bytes`: then no rows of requests are
-- written until tomorrow, only the use of models.
CREATE OR REPLACE FUNCTION open_request_logs(oldest interval, most_bytes bigint) RETURNS timestamptz
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    t CONSTANT timestamptz := clock_timestamp();
    today CONSTANT date := (t AT TIME ZONE 'UTC')::date;
    day date;
BEGIN
    FOR day IN SELECT generate_series(((t - oldest) AT TIME ZONE 'UTC')::date, today + 2, '1 day') LOOP
        CONTINUE WHEN to_regclass(request_logs_of(day)) IS NOT NULL;
        LOCK TABLE request_logs IN SHARE UPDATE EXCLUSIVE MODE; -- one at a time; it stops no reader or writer
        CONTINUE WHEN to_regclass(request_logs_of(day)) IS NOT NULL;
        -- Attached afterwards, since CREATE TABLE ... PARTITION OF would wait for all readers and writers of the others.
        EXECUTE format('CREATE TABLE %I (LIKE request_logs INCLUDING ALL)', request_logs_of(day));
        EXECUTE format('ALTER TABLE request_logs ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                       request_logs_of(day), day::timestamp AT TIME ZONE 'UTC', (day + 1)::timestamp AT TIME ZONE 'UTC');
    END LOOP;
    RETURN CASE WHEN pg_total_relation_size(request_logs_of(today)::regclass) < most_bytes THEN t END;
END $$;

-- Removes the oldest partition before that of today, if it is older than `keep`, or all of them have more than
-- `most_bytes`. Returns its name, or null.
CREATE OR REPLACE FUNCTION trim_request_logs(keep interval, most_bytes bigint) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    t CONSTANT timestamptz := clock_timestamp();
    total bigint;
    oldest text;
    next_day timestamptz;
BEGIN
    SELECT min(relname), sum(pg_total_relation_size(c.oid)) INTO oldest, total
      FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'request_logs'::regclass;
    next_day := (to_date(right(oldest, 8), 'YYYYMMDD') + 1)::timestamp AT TIME ZONE 'UTC';
    IF next_day > t OR (next_day > t - keep AND total <= most_bytes) THEN
        RETURN NULL;
    END IF;
    EXECUTE format('DROP TABLE %I', oldest);
    DELETE FROM model_usage WHERE hour < next_day;
    RETURN oldest;
END $$;
