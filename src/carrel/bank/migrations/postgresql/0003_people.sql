-- What people ask for: their own charges, tokens for programs, and alerts that were given.
CREATE INDEX lien_user ON lien (username, id);

CREATE TABLE token (
    name TEXT PRIMARY KEY,
    hash BYTEA NOT NULL UNIQUE,
    username TEXT NOT NULL,
    scope TEXT NOT NULL CHECK (scope IN ('read', 'admin')),
    note TEXT NOT NULL,
    created_s BIGINT NOT NULL,
    expires_s BIGINT NOT NULL,
    revoked_s BIGINT NOT NULL,
    version BIGINT NOT NULL
);

CREATE TABLE alert (
    project TEXT PRIMARY KEY REFERENCES project (name),
    percent BIGINT NOT NULL,
    told BIGINT NOT NULL,
    number BIGINT NOT NULL,
    version BIGINT NOT NULL
);

-- Jobs as clients of the myBRC API told them; what they cost is in the ledger.
CREATE TABLE mybrc_job (
    id TEXT PRIMARY KEY,
    username TEXT NOT NULL,
    project TEXT NOT NULL,
    status TEXT NOT NULL,
    part TEXT NOT NULL,
    amount BIGINT NOT NULL,
    start_s BIGINT NOT NULL,
    cpu_ms BIGINT NOT NULL,
    body TEXT NOT NULL,
    version BIGINT NOT NULL
);
CREATE INDEX mybrc_job_start ON mybrc_job (start_s, id);
