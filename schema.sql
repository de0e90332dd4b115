-- Loom's whole database: the tables, in the order in which a reader meets them; then loom/sql/, what is decided in the
-- database. Schema version 1.
--
-- Applied by `loom migrate` and by every instance at its start (under one advisory lock, and only when it changed),
-- or by hand: psql -1 -f schema.sql. Safe to run again. PostgreSQL 12 to 18, READ COMMITTED.
--
-- Names and ids are COLLATE "C": an upgrade of the C library changes the order of other collations, which corrupts
-- their unique indexes, and then a lock has two holders.


-- Schema version --------------------------------------------------------------------------------------------------

-- One row. An instance that finds a larger version than its own refuses to start. `checksum` is of this file.
CREATE TABLE IF NOT EXISTS schema_version (
    only_row   boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    version    integer     NOT NULL,
    checksum   text,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO schema_version (version) VALUES (1)
    ON CONFLICT (only_row) DO UPDATE SET version = excluded.version, checksum = NULL, applied_at = clock_timestamp();


-- Cluster ---------------------------------------------------------------------------------------------------------

-- One row of what the cluster as a whole remembers.
CREATE TABLE IF NOT EXISTS cluster (
    only_row         boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    -- the last time that the database came back to the instances; see note_outage()
    outage_ended_at  timestamptz NOT NULL DEFAULT '-infinity',
    -- which history of this database the fencing tokens belong to, and the least one of it; see next_fencing_token()
    fencing_identity text        COLLATE "C",
    fencing_base     bigint      NOT NULL DEFAULT 0,
    -- the greatest id of an event that was removed, by retention or by hand
    events_forgotten bigint      NOT NULL DEFAULT 0
);
INSERT INTO cluster DEFAULT VALUES ON CONFLICT DO NOTHING;


-- Instances -------------------------------------------------------------------------------------------------------

-- One row per running worker. Written by its own heartbeat, by its gunicorn master when it dies, and by upkeep.
-- A row that is removed, also by hand, sends its worker back for a new identity.
CREATE TABLE IF NOT EXISTS instances (
    instance_id    uuid        PRIMARY KEY,
    hostname       text        NOT NULL,
    started_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_heartbeat timestamptz NOT NULL DEFAULT clock_timestamp(),
    status         text        NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'draining', 'dead')),
    metadata       jsonb       NOT NULL DEFAULT '{}'
) WITH (fillfactor = 50);

-- What each instance has answered in each minute, for the charts of the operator's page. Written every few seconds, kept
-- for a day. kind: acquire, events (these two may wait), or request. counts: by duration, see loom/http/metrics.py.
CREATE TABLE IF NOT EXISTS traffic (
    minute      timestamptz NOT NULL,
    instance_id uuid        NOT NULL,
    kind        text        NOT NULL,
    requests    bigint      NOT NULL,
    errors      bigint      NOT NULL,
    seconds     float8      NOT NULL,
    counts      bigint[]    NOT NULL,
    PRIMARY KEY (minute, instance_id, kind)
) WITH (fillfactor = 50);


-- Locks -----------------------------------------------------------------------------------------------------------

-- Every grant draws a larger number than all before it. Stand-alone on purpose: TRUNCATE ... RESTART IDENTITY resets a
-- sequence that a column owns. Below 2^53, so that every JSON reader keeps it exact. CACHE 1: a cached block would be
-- handed out late.
CREATE SEQUENCE IF NOT EXISTS fencing_tokens MAXVALUE 9007199254740991 CACHE 1;

-- One row per held lock. The primary key is the promise: two holders of one lock cannot exist. A row past expires_at is
-- free to take. A grant ends when its row is deleted, by whomever; the triggers in
-- loom/sql/locks.sql then write its history.
CREATE TABLE IF NOT EXISTS distributed_locks (
    lock_name     text        COLLATE "C" PRIMARY KEY CHECK (char_length(lock_name) BETWEEN 1 AND 255),
    instance_id   uuid,
    owner         text        COLLATE "C" NOT NULL,
    fencing_token bigint      NOT NULL,
    acquired_at   timestamptz NOT NULL,
    expires_at    timestamptz NOT NULL,
    heartbeat_at  timestamptz NOT NULL,
    metadata      jsonb       NOT NULL DEFAULT '{}'
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
        autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 10000);
CREATE INDEX IF NOT EXISTS distributed_locks_owner ON distributed_locks (owner);

-- The history: one row per grant that has ended. Written by the triggers alone; kept for locks.history_days.
-- proxy_request_id: of the request that ended it, see acting_as().
CREATE TABLE IF NOT EXISTS grants (
    lock_name     text        COLLATE "C" NOT NULL,
    instance_id   uuid,
    owner         text        COLLATE "C" NOT NULL,
    fencing_token bigint      PRIMARY KEY,
    acquired_at   timestamptz NOT NULL,
    expires_at    timestamptz NOT NULL,
    heartbeat_at  timestamptz NOT NULL,
    metadata      jsonb       NOT NULL,
    ended_at      timestamptz NOT NULL,
    ended_how     text        NOT NULL CHECK (ended_how IN ('released', 'expired', 'forced', 'owner-died')),
    reason        text,
    proxy_request_id text     COLLATE "C" DEFAULT NULLIF(current_setting('loom.proxy_request_id', true), '')
);
CREATE INDEX IF NOT EXISTS grants_lock_name ON grants (lock_name, fencing_token);
CREATE INDEX IF NOT EXISTS grants_owner ON grants (owner, fencing_token);

-- Who waits for a lock, first come, first served. A place lasts 2 s after its last ask. UNLOGGED: a waiter whose place
-- is lost in a crash asks again.
CREATE UNLOGGED TABLE IF NOT EXISTS lock_waiters (
    lock_name text        COLLATE "C" NOT NULL,
    owner     text        COLLATE "C" NOT NULL,
    place     bigint      GENERATED BY DEFAULT AS IDENTITY,
    asked_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (lock_name, owner)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
CREATE INDEX IF NOT EXISTS lock_waiters_place ON lock_waiters (lock_name, place);

-- How long a place lasts after its last ask: longer than the pause between two polls of a worker, or between two
-- requests of a client that is sent away; short, since a waiter that has died holds up the others for so long.
CREATE OR REPLACE FUNCTION keeps_place(asked_at timestamptz, t timestamptz) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT asked_at > t - INTERVAL '2 seconds';
$$;


-- Events ----------------------------------------------------------------------------------------------------------

-- One row per version of every entity of the shared state: the feed, and the entity's history. Written by
-- write_event() alone; bounded by retention alone. Rows never change.
CREATE TABLE IF NOT EXISTS events (
    place       bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY, -- in the order of insertion: of versions, too
    type        text        NOT NULL,
    entity_type text        NOT NULL,
    entity_id   text        COLLATE "C" NOT NULL,
    version     bigint      NOT NULL,
    project_id  text        COLLATE "C",
    -- who did it, see acting_as(); by hand in psql nobody says so: then it is the database's user
    actor       text        NOT NULL DEFAULT COALESCE(NULLIF(current_setting('loom.actor', true), ''), session_user),
    instance_id uuid        DEFAULT NULLIF(current_setting('loom.instance_id', true), '')::uuid,
    -- the client's, for correlation: it decides nothing
    request_id  text        COLLATE "C" DEFAULT NULLIF(current_setting('loom.request_id', true), ''),
    -- the proxy's, by which a write that it repeats is known; answered to nobody
    proxy_request_id text   COLLATE "C" DEFAULT NULLIF(current_setting('loom.proxy_request_id', true), ''),
    timestamp   timestamptz NOT NULL,
    changes     jsonb       NOT NULL -- the fields that changed, with their new values
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX IF NOT EXISTS events_entity ON events (entity_type, entity_id, place);

-- The feed's order, which is not that of `place`: what commits late comes late. Written by number_events() alone. (A
-- column of events, filled by an UPDATE, took three times as long and 1.7 times the WAL, and left a dead row an event.)
CREATE TABLE IF NOT EXISTS event_numbers (
    id    bigint PRIMARY KEY, -- the cursor
    place bigint NOT NULL UNIQUE
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);

-- The places that have no number: behind the last one, and before it those that could not be seen when later ones were
-- numbered, since their transaction was under way or will never commit. xid: each of these transactions has a smaller
-- one; null when not yet known.
CREATE TABLE IF NOT EXISTS event_gaps (
    first bigint NOT NULL,
    last  bigint NOT NULL,
    xid   bigint
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
INSERT INTO event_gaps SELECT 1, 9223372036854775807 WHERE NOT EXISTS (SELECT 1 FROM event_gaps);
CREATE OR REPLACE VIEW feed AS
    SELECT n.id, e.* FROM event_numbers n JOIN events e ON e.place = n.place;


-- Entities --------------------------------------------------------------------------------------------------------

-- Whether HTTP can answer a JSON value and accept it again: no number is beyond a double, and it has at most 100
-- levels. A single number of 5,000 digits, written by hand, made every list and the feed fail. What has fewer than 200
-- bytes cannot break either rule.
CREATE OR REPLACE FUNCTION answerable(value jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT octet_length(value::text) < 200 OR NOT (
        jsonb_path_exists(value, 'strict $.** ? (@ > 1.7976931348623158e308 || @ < -1.7976931348623158e308)')
        OR jsonb_path_exists(value, 'strict $.**{100} ? (@.type() == "array" || @.type() == "object")'))
$$;

-- What a column may hold, where more than its type is asked. Domains, not CHECKs: those of a table are read and
-- compiled anew by each UPDATE, whichever columns it writes, and took a sixth of a claim's time.
DO $$
DECLARE
    name text;
    definition text;
BEGIN
    FOR name, definition IN VALUES
        ('jsonb_object', 'jsonb CHECK (jsonb_typeof(VALUE) = ''object'') CHECK (answerable(VALUE))'),
        ('texts', 'text[] CHECK (array_position(VALUE, NULL) IS NULL)'),
        ('moment', 'timestamptz CHECK (VALUE BETWEEN ''0001-01-01 00:00+00'' AND ''9999-12-31 23:59:59.999999+00'')'),
        ('counter', 'integer CHECK (VALUE >= 0)'),
        ('bead_priority', 'smallint CHECK (VALUE BETWEEN 0 AND 4)'),
        ('bead_status', 'text COLLATE "C"
                         CHECK (VALUE IN (''open'', ''in_progress'', ''blocked'', ''deferred'', ''closed''))'),
        ('agent_status', 'text
                          CHECK (VALUE IN (''paused'', ''idle'', ''working'', ''deciding'', ''blocked'', ''dead''))')
    LOOP
        IF to_regtype(quote_ident(name)) IS NULL THEN
            EXECUTE format('CREATE DOMAIN %I AS %s', name, definition);
        END IF;
    END LOOP;
END $$;

-- Each kind of shared state is a table with id, version, created_at and updated_at. Every UPDATE adds 1 to the version
-- and writes one event, also by hand; but not one of columns that are derived or belong to a lease (they are listed
-- with the triggers, in loom/sql/entities.sql). A function that sets the version itself writes its event itself. The
-- checks hold off what cannot be answered as JSON by HTTP, whoever writes it.
CREATE TABLE IF NOT EXISTS projects (
    id                 text        COLLATE "C" PRIMARY KEY,
    name               text        NOT NULL,
    description        text        NOT NULL DEFAULT '',
    git_repo           text        NOT NULL DEFAULT '',
    branch             text        NOT NULL DEFAULT '',
    beads_path         text        NOT NULL DEFAULT '',
    bead_prefix        text        COLLATE "C" NOT NULL DEFAULT 'bd',
    parent_id          text        COLLATE "C" REFERENCES projects,
    is_perpetual       boolean     NOT NULL DEFAULT false,
    is_sticky          boolean     NOT NULL DEFAULT false,
    git_strategy       text        NOT NULL DEFAULT 'direct' CHECK (git_strategy IN ('direct', 'branch-pr')),
    git_auth_method    text        NOT NULL DEFAULT 'none'
                                   CHECK (git_auth_method IN ('none', 'ssh', 'token', 'basic', 'git-helper')),
    git_credential_id  text        COLLATE "C",
    git_config_options jsonb_object NOT NULL DEFAULT '{}',
    work_dir           text,
    last_sync_at       moment,
    last_commit_hash   text,
    status             text        NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'closed', 'reopened')),
    context            jsonb_object NOT NULL DEFAULT '{}',
    attributes         jsonb_object NOT NULL DEFAULT '{}',
    due_date           moment,
    closed_at          timestamptz,
    version            bigint      NOT NULL DEFAULT 1,
    created_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at         timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE SEQUENCE IF NOT EXISTS project_numbers;
CREATE INDEX IF NOT EXISTS projects_parent ON projects (parent_id) WHERE parent_id IS NOT NULL;

CREATE TABLE IF NOT EXISTS providers (
    id                        text        COLLATE "C" PRIMARY KEY,
    name                      text        NOT NULL,
    type                      text        NOT NULL DEFAULT '',
    endpoint                  text        NOT NULL DEFAULT '',
    model                     text        NOT NULL DEFAULT '',
    configured_model          text        NOT NULL DEFAULT '',
    selected_model            text        NOT NULL DEFAULT '',
    selection_reason          text        NOT NULL DEFAULT '',
    model_score               float8      NOT NULL DEFAULT 0 CHECK (abs(model_score) < 'Infinity'),
    selected_gpu              text        NOT NULL DEFAULT '',
    gpu_constraints           jsonb_object,
    description               text        NOT NULL DEFAULT '',
    requires_key              boolean     NOT NULL DEFAULT false,
    key_id                    text        COLLATE "C" NOT NULL DEFAULT '',
    owner_id                  text        COLLATE "C" NOT NULL DEFAULT '',
    is_shared                 boolean     NOT NULL DEFAULT true,
    status                    text        NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'active', 'error')),
    last_heartbeat_at         moment,
    last_heartbeat_latency_ms bigint      NOT NULL DEFAULT 0,
    last_heartbeat_error      text        NOT NULL DEFAULT '',
    cost_per_mtoken           float8      NOT NULL DEFAULT 0 CHECK (abs(cost_per_mtoken) < 'Infinity'),
    context_window            bigint      NOT NULL DEFAULT 0,
    supports_function         boolean     NOT NULL DEFAULT false,
    supports_vision           boolean     NOT NULL DEFAULT false,
    supports_streaming        boolean     NOT NULL DEFAULT false,
    tags                      texts       NOT NULL DEFAULT '{}',
    metrics                   jsonb_object NOT NULL DEFAULT '{}',
    attributes                jsonb_object NOT NULL DEFAULT '{}',
    version                   bigint      NOT NULL DEFAULT 1,
    created_at                timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at                timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- heartbeat_at is null until the agent's first heartbeat: only then can it die of missing them. open_claims bounds the
-- beads that it has in progress; changed in the transaction that claims or ends a claim.
CREATE TABLE IF NOT EXISTS agents (
    id           text        COLLATE "C" PRIMARY KEY,
    name         text        NOT NULL,
    role         text        NOT NULL DEFAULT '',
    persona_name text        NOT NULL DEFAULT '',
    persona      jsonb_object,
    provider_id  text        COLLATE "C" REFERENCES providers ON DELETE SET NULL,
    status       agent_status NOT NULL DEFAULT 'idle',
    current_bead text        COLLATE "C",
    project_id   text        COLLATE "C" REFERENCES projects,
    position_id  text        COLLATE "C",
    capabilities texts       NOT NULL DEFAULT '{}',
    attributes   jsonb_object NOT NULL DEFAULT '{}',
    open_claims  counter     NOT NULL DEFAULT 0,
    started_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_active  timestamptz NOT NULL DEFAULT clock_timestamp(),
    heartbeat_at timestamptz,
    version      bigint      NOT NULL DEFAULT 1,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at   timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50, autovacuum_analyze_threshold = 5000);
CREATE INDEX IF NOT EXISTS agents_project ON agents (project_id, id);
CREATE INDEX IF NOT EXISTS agents_role ON agents (role) WHERE role <> '';
CREATE INDEX IF NOT EXISTS agents_provider ON agents (provider_id) WHERE provider_id IS NOT NULL;

-- What all instances share: settings of Loom's own, which beat the environment and the file of each, and what agents
-- keep here. All of it is read at once, hence the bounds.
CREATE TABLE IF NOT EXISTS config (
    key        text        COLLATE "C" PRIMARY KEY,
    value      jsonb       NOT NULL,
    updated_by text        NOT NULL DEFAULT '',
    version    bigint      NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE IF NOT EXISTS comments (
    id              text        COLLATE "C" PRIMARY KEY
                                DEFAULT md5(random()::text || clock_timestamp()::text)::uuid::text,
    entity_type     text        NOT NULL CHECK (entity_type IN ('bead', 'project')),
    entity_id       text        COLLATE "C" NOT NULL,
    parent_id       text        COLLATE "C" REFERENCES comments ON DELETE CASCADE,
    project_id      text        COLLATE "C" NOT NULL,
    author_id       text        COLLATE "C" NOT NULL DEFAULT '',
    author_username text        NOT NULL DEFAULT '',
    content         text        NOT NULL,
    version         bigint      NOT NULL DEFAULT 1,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at      timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS comments_entity ON comments (entity_type, entity_id, created_at, id);
CREATE INDEX IF NOT EXISTS comments_parent ON comments (parent_id) WHERE parent_id IS NOT NULL;


-- Beads -----------------------------------------------------------------------------------------------------------

-- Whether a bead can be claimed now: by any agent, or by the one that it is reserved for. Inlined by the planner, so
-- the indexes of beads that use it match.
CREATE OR REPLACE FUNCTION is_ready(
    status bead_status, open_blockers counter, open_children counter, not_before timestamptz)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT status = 'open' AND open_blockers = 0 AND open_children = 0 AND not_before IS NULL;
$$;

-- When the clock alone changes a bead: its delay or its lease ends.
CREATE OR REPLACE FUNCTION wakes_at(not_before timestamptz, lease_expires_at timestamptz)
RETURNS timestamptz LANGUAGE sql IMMUTABLE AS 'SELECT COALESCE(not_before, lease_expires_at)';

-- A unit of work. blocked_by is the truth about dependencies, bead_blockers its index. A claim is fencing_token and the
-- lease; who has one is assigned_to. assigned_to of an open bead reserves it. open_blockers and open_children count
-- what keeps it from being ready; the triggers in loom/sql/beads.sql maintain them.
CREATE TABLE IF NOT EXISTS beads (
    id               text        COLLATE "C" PRIMARY KEY,
    type             text        COLLATE "C" NOT NULL DEFAULT 'task',
    title            text        NOT NULL,
    description      text        NOT NULL DEFAULT '',
    status           bead_status NOT NULL DEFAULT 'open',
    priority         bead_priority NOT NULL DEFAULT 2,
    project_id       text        COLLATE "C" NOT NULL REFERENCES projects,
    assigned_to      text        COLLATE "C",
    parent           text        COLLATE "C" REFERENCES beads ON DELETE SET NULL,
    blocked_by       texts       COLLATE "C" NOT NULL DEFAULT '{}',
    related_to       texts       COLLATE "C" NOT NULL DEFAULT '{}',
    tags             texts       NOT NULL DEFAULT '{}',
    context          jsonb_object NOT NULL DEFAULT '{}',
    attributes       jsonb_object NOT NULL DEFAULT '{}',
    due_date         moment,
    estimated_time   bigint,     -- minutes
    milestone_id     text        COLLATE "C",
    attempts         integer     NOT NULL DEFAULT 0,
    failures         integer     NOT NULL DEFAULT 0,
    blocked_reason   text,
    close_reason     text,
    closed_at        timestamptz,
    fencing_token    bigint,
    claimed_at       timestamptz,
    lease_seconds    integer,
    lease_expires_at timestamptz,
    not_before       timestamptz, -- delayed until then: after a failure, or deferred
    open_blockers    counter     NOT NULL DEFAULT 0,
    open_children    counter     NOT NULL DEFAULT 0,
    version          bigint      NOT NULL DEFAULT 1,
    created_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at       timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 80, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_scale_factor = 0.02,
        autovacuum_vacuum_cost_delay = 0, vacuum_index_cleanup = on,
        -- A claim changes a status, and no plan: a small table is not analyzed again for each 400 claims.
        autovacuum_analyze_scale_factor = 0.05, autovacuum_analyze_threshold = 50000);
DO $$
BEGIN
    -- PostgreSQL 18 counts inserted rows against those that are not frozen: with the default, each 5,000 new beads
    -- would be a reason to go through all indexes. PostgreSQL 12 does not have this setting.
    IF current_setting('server_version_num')::integer >= 130000 THEN
        ALTER TABLE beads SET (autovacuum_vacuum_insert_threshold = 100000);
    END IF;
END $$;
CREATE SEQUENCE IF NOT EXISTS bead_numbers;

-- The best ready bead is the first of these: the free ones (without assigned_to) and those reserved for one agent, the
-- free ones of one project, of one type; no due date sorts last. beads_ready_tags finds tags that few have. Narrow on
-- purpose: a claim steps over the entries that those before it have left, until a vacuum comes.
CREATE INDEX IF NOT EXISTS beads_ready ON beads (assigned_to, priority, due_date, created_at)
    WHERE is_ready(status, open_blockers, open_children, not_before);
CREATE INDEX IF NOT EXISTS beads_ready_project ON beads (project_id, priority, due_date, created_at)
    WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL;
CREATE INDEX IF NOT EXISTS beads_ready_type ON beads (type, priority, due_date, created_at)
    WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL;
CREATE INDEX IF NOT EXISTS beads_ready_tags ON beads USING gin (tags) WITH (fastupdate = off)
    WHERE is_ready(status, open_blockers, open_children, not_before) AND assigned_to IS NULL AND tags <> '{}';

-- What the clock alone changes: the claimed (in_progress) and the delayed (open).
CREATE INDEX IF NOT EXISTS beads_wakes_at ON beads (status, wakes_at(not_before, lease_expires_at))
    WHERE wakes_at(not_before, lease_expires_at) IS NOT NULL;

-- Lists: each column with the status, of which there are few, and then in the order of pages.
CREATE INDEX IF NOT EXISTS beads_in_status ON beads (status, id);
CREATE INDEX IF NOT EXISTS beads_in_project ON beads (project_id, status, id);
CREATE INDEX IF NOT EXISTS beads_assigned ON beads (assigned_to, status, id) WHERE assigned_to IS NOT NULL;
CREATE INDEX IF NOT EXISTS beads_of_type ON beads (type, status, id);
CREATE INDEX IF NOT EXISTS beads_parent ON beads (parent, id) WHERE parent IS NOT NULL;

-- The index of blocked_by, for both directions. Written by the triggers alone.
CREATE TABLE IF NOT EXISTS bead_blockers (
    bead_id    text COLLATE "C" NOT NULL,
    blocker_id text COLLATE "C" NOT NULL,
    PRIMARY KEY (blocker_id, bead_id)
);

-- One row per claim that has ended, as grants has for locks. Written by the trigger alone; kept for locks.history_days.
CREATE TABLE IF NOT EXISTS claims (
    fencing_token    bigint      PRIMARY KEY,
    bead_id          text        COLLATE "C" NOT NULL,
    agent_id         text        COLLATE "C" NOT NULL,
    claimed_at       timestamptz NOT NULL,
    lease_expires_at timestamptz NOT NULL,
    ended_at         timestamptz NOT NULL,
    ended_how        text        NOT NULL
                     CHECK (ended_how IN ('completed', 'failed', 'released', 'lapsed', 'agent-died', 'changed')),
    reason           text
);
CREATE INDEX IF NOT EXISTS claims_bead ON claims (bead_id, fencing_token);
CREATE INDEX IF NOT EXISTS distributed_locks_bead ON distributed_locks ((metadata ->> 'bead_id'))
    WHERE metadata ? 'file_path';


-- Idempotency keys ------------------------------------------------------------------------------------------------

-- One row per answered request that bore an Idempotency-Key, kept for a day. Written by loom.state.idempotency, in the
-- transaction of what the request did. The primary key is the promise: it is applied once. `scope` is a hash of key,
-- method, path and caller, which stand beside it for people; `fingerprint` one of all else that the request says.
CREATE TABLE IF NOT EXISTS idempotency_keys (
    scope       uuid        PRIMARY KEY,
    key         text        COLLATE "C" NOT NULL,
    method      text        COLLATE "C" NOT NULL,
    path        text        COLLATE "C" NOT NULL,
    caller      text        COLLATE "C" NOT NULL,
    fingerprint bytea       NOT NULL,
    status      integer     NOT NULL,
    headers     jsonb       NOT NULL,
    body        bytea       NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS idempotency_keys_created_at ON idempotency_keys (created_at);


-- Request logs ----------------------------------------------------------------------------------------------------

-- One row per HTTP request (written in batches by loom/state/request_rows.py) and per use of a model that an agent has
-- reported (by loom/state/logs.py; only these have a provider_id). A partition for each day in UTC; made ahead and
-- removed by loom/sql/logs.sql. The key makes it safe to write a batch again whose outcome is unknown.
CREATE TABLE IF NOT EXISTS request_logs (
    timestamp         timestamptz NOT NULL, -- when the request ended, on the database's clock
    id                bigint      NOT NULL, -- random
    request_id        text        COLLATE "C",
    instance_id       uuid,
    user_id           text        COLLATE "C",
    method            text        COLLATE "C",
    route             text        COLLATE "C", -- the path in the contract
    path              text        COLLATE "C",
    status_code       integer,
    latency_ms        float8,
    database_ms       float8,
    lock_name         text        COLLATE "C",
    bead_id           text        COLLATE "C",
    agent_id          text        COLLATE "C",
    project_id        text        COLLATE "C",
    provider_id       text        COLLATE "C",
    model_name        text        COLLATE "C",
    prompt_tokens     bigint,
    completion_tokens bigint,
    cost_usd          numeric(20, 10),
    error_message     text,
    metadata          jsonb,
    PRIMARY KEY (timestamp, id)
) PARTITION BY RANGE (timestamp);
CREATE INDEX IF NOT EXISTS request_logs_usage ON request_logs (timestamp, id) WHERE provider_id IS NOT NULL;

-- The sums of the reported uses in each hour, so that totals over millions of them take no second. Written in the
-- transaction of the report, and removed with the day's partition.
CREATE TABLE IF NOT EXISTS model_usage (
    hour              timestamptz NOT NULL,
    provider_id       text        COLLATE "C" NOT NULL,
    model_name        text        COLLATE "C" NOT NULL,
    user_id           text        COLLATE "C" NOT NULL,
    project_id        text        COLLATE "C" NOT NULL, -- '' without one
    requests          bigint      NOT NULL,
    errors            bigint      NOT NULL,
    prompt_tokens     bigint      NOT NULL,
    completion_tokens bigint      NOT NULL,
    cost_usd          numeric(30, 10) NOT NULL,
    latency_ms        float8      NOT NULL,
    PRIMARY KEY (hour, provider_id, model_name, user_id, project_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);


-- Imports ---------------------------------------------------------------------------------------------------------

-- How far an import with --resume has come: up to which row of each kind, in the order of writing. Written by
-- loom/transfer in the transaction of each batch, and removed once both sides were compared.
CREATE TABLE IF NOT EXISTS imports (
    source text    NOT NULL,
    kind   text    NOT NULL,
    level  integer NOT NULL,
    n      bigint  NOT NULL,
    PRIMARY KEY (source, kind)
);


-- What is decided in the database --------------------------------------------------------------------------------

\ir loom/sql/tokens.sql
\ir loom/sql/locks.sql
\ir loom/sql/instances.sql
\ir loom/sql/pages.sql
\ir loom/sql/events.sql
\ir loom/sql/entities.sql
\ir loom/sql/projects.sql
\ir loom/sql/comments.sql
\ir loom/sql/config.sql
\ir loom/sql/agents.sql
\ir loom/sql/beads.sql
\ir loom/sql/lapses.sql
\ir loom/sql/claims.sql
\ir loom/sql/file_locks.sql
\ir loom/sql/deletions.sql
\ir loom/sql/idempotency.sql
\ir loom/sql/logs.sql
\ir loom/sql/privileges.sql
