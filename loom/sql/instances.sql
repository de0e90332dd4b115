-- Instances: heartbeats, outages, and the grants that end with an instance.

-- If no instance has sent a heartbeat for the time of three, the database was away, not the instances.
CREATE OR REPLACE FUNCTION note_outage() RETURNS void LANGUAGE sql AS $$
    UPDATE cluster SET outage_ended_at = clock_timestamp()
     WHERE (SELECT max(last_heartbeat) FROM instances WHERE status <> 'dead')
           < clock_timestamp() - INTERVAL '15 seconds';
$$;

CREATE OR REPLACE FUNCTION register_instance(id uuid, host text, about jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM note_outage();
    INSERT INTO instances (instance_id, hostname, metadata) VALUES (id, host, about);
END $$;

-- Null if the instance was removed or declared dead: the caller registers with a new identity; a dead row stays dead.
-- Else the status that the row has now: 'draining' that an operator has written stays, and is an order that the caller
-- obeys, until somebody writes 'active' again.
DROP FUNCTION IF EXISTS heartbeat_instance(uuid, text);
CREATE FUNCTION heartbeat_instance(id uuid, new_status text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    stays text;
BEGIN
    PERFORM note_outage();
    UPDATE instances SET last_heartbeat = clock_timestamp(),
                         status = CASE WHEN new_status = 'draining' THEN new_status ELSE status END
     WHERE instance_id = id AND status <> 'dead' RETURNING status INTO stays;
    RETURN stays;
END $$;

-- Whether a missed heartbeat counts: not in the first minute after the database came back.
CREATE OR REPLACE FUNCTION heartbeats_count() RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT GREATEST(pg_postmaster_start_time(), (SELECT outage_ended_at FROM cluster))
           < clock_timestamp() - INTERVAL '60 seconds';
$$;

CREATE OR REPLACE FUNCTION instance_status(status text, last_heartbeat timestamptz)
RETURNS text LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN last_heartbeat < clock_timestamp() - INTERVAL '60 seconds' AND heartbeats_count()
                THEN 'dead' ELSE status END;
$$;

-- Ends the grants that an instance holds for itself.
CREATE OR REPLACE FUNCTION end_grants_of_instance(id uuid, how text) RETURNS void LANGUAGE sql AS $$
    SELECT end_grants(ARRAY(SELECT l FROM distributed_locks l WHERE l.owner = 'instance:' || id), how);
$$;

CREATE OR REPLACE FUNCTION on_instance_ended() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM end_grants_of_instance(OLD.instance_id, 'owner-died');
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS instance_deleted ON instances;
CREATE TRIGGER instance_deleted AFTER DELETE ON instances FOR EACH ROW EXECUTE FUNCTION on_instance_ended();
DROP TRIGGER IF EXISTS instance_died ON instances;
CREATE TRIGGER instance_died AFTER UPDATE OF status ON instances FOR EACH ROW
    WHEN (NEW.status = 'dead' AND OLD.status <> 'dead') EXECUTE FUNCTION on_instance_ended();

CREATE OR REPLACE FUNCTION leave_instance(id uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    -- Locks the row of the instance first, as on_instance_ended() does: two orders would deadlock.
    PERFORM 1 FROM instances WHERE instance_id = id FOR UPDATE;
    PERFORM end_grants_of_instance(id, 'released');
    DELETE FROM instances WHERE instance_id = id;
END $$;
