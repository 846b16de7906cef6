-- The ledger. Amounts are micro-SU. docs/reference/bank-ledger.md says what each table is for.
CREATE TABLE project (
    name TEXT PRIMARY KEY,
    parent TEXT NOT NULL,
    cap INTEGER CHECK (cap >= 0),
    committed INTEGER NOT NULL,
    version INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE member (
    project TEXT NOT NULL REFERENCES project (name),
    username TEXT NOT NULL,
    cap INTEGER CHECK (cap >= 0),
    committed INTEGER NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (project, username)
) STRICT, WITHOUT ROWID;

CREATE TABLE allocation (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    project TEXT NOT NULL REFERENCES project (name),
    start_s INTEGER NOT NULL,
    end_s INTEGER CHECK (end_s > start_s),
    priority INTEGER NOT NULL,
    credit INTEGER NOT NULL CHECK (credit >= 0),
    version INTEGER NOT NULL
) STRICT;
CREATE INDEX allocation_project ON allocation (project);
CREATE INDEX allocation_end ON allocation (end_s) WHERE end_s IS NOT NULL;

CREATE TABLE account (
    id INTEGER PRIMARY KEY,
    allocation INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('available', 'lien', 'spent', 'expired', 'issued', 'adjust')),
    balance INTEGER NOT NULL,
    floor INTEGER NOT NULL,
    overdrawn INTEGER NOT NULL CHECK (overdrawn IN (0, 1)),
    version INTEGER NOT NULL,
    CHECK (balance >= floor OR (kind = 'available' AND overdrawn) OR kind = 'issued' OR kind = 'adjust')
) STRICT;
INSERT INTO account VALUES (0, 0, 'issued', 0, 0, 0, 1), (1, 0, 'adjust', 0, 0, 0, 1);

CREATE TABLE lien (
    id INTEGER PRIMARY KEY,
    cluster TEXT NOT NULL,
    token_ref TEXT UNIQUE,
    run_ref TEXT,
    job_id INTEGER NOT NULL,
    project TEXT NOT NULL,
    username TEXT NOT NULL,
    state TEXT NOT NULL,
    units INTEGER NOT NULL CHECK (units >= 1),
    unit INTEGER NOT NULL CHECK (unit >= 0),
    open INTEGER NOT NULL CHECK (open >= 0),
    charged INTEGER NOT NULL CHECK (charged >= 0),
    refunded INTEGER NOT NULL CHECK (refunded >= 0 AND refunded <= charged),
    expires_s INTEGER,
    flags TEXT NOT NULL,
    parent INTEGER NOT NULL,
    version INTEGER NOT NULL,
    -- instr and not IN: SQLite builds a table of a list anew for each row, which doubled the cost of a lien.
    CHECK (instr(' quoted lapsed unbound bound active unknown_end void settled part_refunded refunded ',
                 ' ' || state || ' ')),
    CHECK (expires_s IS NOT NULL OR run_ref IS NOT NULL OR parent > 0 OR NOT instr(' quoted unbound bound ',
                                                                                   ' ' || state || ' ')),
    CHECK (open = 0 OR instr(' unbound bound active unknown_end ', ' ' || state || ' ')),
    CHECK (charged = 0 OR instr(' settled part_refunded refunded ', ' ' || state || ' '))
) STRICT;
CREATE UNIQUE INDEX lien_run ON lien (run_ref) WHERE run_ref IS NOT NULL;
CREATE INDEX lien_expires ON lien (expires_s) WHERE expires_s IS NOT NULL;
CREATE INDEX lien_project ON lien (project, id);

CREATE TABLE leg (
    lien INTEGER NOT NULL REFERENCES lien (id),
    position INTEGER NOT NULL,
    allocation INTEGER NOT NULL REFERENCES allocation (id),
    open INTEGER NOT NULL CHECK (open >= 0),
    charged INTEGER NOT NULL CHECK (charged >= 0),
    refunded INTEGER NOT NULL CHECK (refunded >= 0 AND refunded <= charged),
    version INTEGER NOT NULL,
    PRIMARY KEY (lien, position)
) STRICT, WITHOUT ROWID;

CREATE TABLE txn (
    seq INTEGER PRIMARY KEY,
    at_s INTEGER NOT NULL,
    kind TEXT NOT NULL,
    lien INTEGER NOT NULL,
    key TEXT NOT NULL,
    flags TEXT NOT NULL,
    request TEXT NOT NULL,
    hash BLOB NOT NULL
) STRICT;
CREATE INDEX txn_lien ON txn (lien) WHERE lien > 0;

CREATE TABLE entry (
    seq INTEGER NOT NULL REFERENCES txn (seq),
    account INTEGER NOT NULL REFERENCES account (id),
    amount INTEGER NOT NULL CHECK (amount <> 0),
    balance INTEGER NOT NULL,
    PRIMARY KEY (seq, account)
) STRICT, WITHOUT ROWID;
CREATE INDEX entry_account ON entry (account, seq);

CREATE TABLE idempotency (
    key TEXT PRIMARY KEY,
    request_hash BLOB NOT NULL,
    answer TEXT NOT NULL,
    at_s INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What was written stays. (INSERT OR REPLACE asks a DELETE trigger only with PRAGMA recursive_triggers, which we set; who
-- does not is named by the hashes. A trigger before each INSERT would cost a sixth of all time.)
CREATE TRIGGER txn_no_update BEFORE UPDATE ON txn BEGIN SELECT RAISE(ABORT, 'txn is append-only'); END;
CREATE TRIGGER txn_no_delete BEFORE DELETE ON txn BEGIN SELECT RAISE(ABORT, 'txn is append-only'); END;
CREATE TRIGGER entry_no_update BEFORE UPDATE ON entry BEGIN SELECT RAISE(ABORT, 'entry is append-only'); END;
CREATE TRIGGER entry_no_delete BEFORE DELETE ON entry BEGIN SELECT RAISE(ABORT, 'entry is append-only'); END;
CREATE TRIGGER idempotency_no_update BEFORE UPDATE ON idempotency
BEGIN SELECT RAISE(ABORT, 'idempotency is append-only'); END;
CREATE TRIGGER idempotency_no_delete BEFORE DELETE ON idempotency
BEGIN SELECT RAISE(ABORT, 'idempotency is append-only'); END;
-- Rows that change are never removed either, and a final state is final.
CREATE TRIGGER account_no_delete BEFORE DELETE ON account BEGIN SELECT RAISE(ABORT, 'accounts stay'); END;
CREATE TRIGGER lien_no_delete BEFORE DELETE ON lien BEGIN SELECT RAISE(ABORT, 'liens stay'); END;
CREATE TRIGGER lien_final BEFORE UPDATE OF state ON lien
WHEN OLD.state <> NEW.state AND (
    instr(' void lapsed ', ' ' || OLD.state || ' ')
    OR (instr(' settled part_refunded refunded ', ' ' || OLD.state || ' ')
        AND NOT instr(' settled part_refunded refunded ', ' ' || NEW.state || ' ')))
BEGIN SELECT RAISE(ABORT, 'a final state is final'); END;
