-- What people ask for: their own charges, tokens for programs, and alerts that were given.
CREATE INDEX lien_user ON lien (username, id);

CREATE TABLE token (
    name TEXT PRIMARY KEY,
    hash BLOB NOT NULL UNIQUE,
    username TEXT NOT NULL,
    scope TEXT NOT NULL CHECK (scope IN ('read', 'admin')),
    note TEXT NOT NULL,
    created_s INTEGER NOT NULL,
    expires_s INTEGER NOT NULL,
    revoked_s INTEGER NOT NULL,
    version INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE alert (
    project TEXT PRIMARY KEY REFERENCES project (name),
    percent INTEGER NOT NULL,
    told INTEGER NOT NULL,
    number INTEGER NOT NULL,
    version INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Jobs as clients of the myBRC API told them; what they cost is in the ledger.
CREATE TABLE mybrc_job (
    id TEXT PRIMARY KEY,
    username TEXT NOT NULL,
    project TEXT NOT NULL,
    status TEXT NOT NULL,
    part TEXT NOT NULL,
    amount INTEGER NOT NULL,
    start_s INTEGER NOT NULL,
    cpu_ms INTEGER NOT NULL,
    body TEXT NOT NULL,
    version INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX mybrc_job_start ON mybrc_job (start_s, id);
