-- The ledger. Amounts are micro-SU. docs/reference/bank-ledger.md says what each table is for.
CREATE TABLE project (
    name TEXT PRIMARY KEY,
    parent TEXT NOT NULL,
    cap BIGINT CHECK (cap >= 0),
    committed BIGINT NOT NULL,
    version BIGINT NOT NULL
);

CREATE TABLE member (
    project TEXT NOT NULL REFERENCES project (name),
    username TEXT NOT NULL,
    cap BIGINT CHECK (cap >= 0),
    committed BIGINT NOT NULL,
    version BIGINT NOT NULL,
    PRIMARY KEY (project, username)
);

CREATE TABLE allocation (
    id BIGINT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    project TEXT NOT NULL REFERENCES project (name),
    start_s BIGINT NOT NULL,
    end_s BIGINT CHECK (end_s > start_s),
    priority BIGINT NOT NULL,
    credit BIGINT NOT NULL CHECK (credit >= 0),
    version BIGINT NOT NULL
);
CREATE INDEX allocation_project ON allocation (project);
CREATE INDEX allocation_end ON allocation (end_s) WHERE end_s IS NOT NULL;

CREATE TABLE account (
    id BIGINT PRIMARY KEY,
    allocation BIGINT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('available', 'lien', 'spent', 'expired', 'issued', 'adjust')),
    balance BIGINT NOT NULL,
    floor BIGINT NOT NULL,
    overdrawn BOOLEAN NOT NULL,
    version BIGINT NOT NULL,
    CHECK (kind IN ('issued', 'adjust') OR balance >= floor OR (kind = 'available' AND overdrawn))
);
INSERT INTO account VALUES (0, 0, 'issued', 0, 0, FALSE, 1), (1, 0, 'adjust', 0, 0, FALSE, 1);

CREATE TABLE lien (
    id BIGINT PRIMARY KEY,
    cluster TEXT NOT NULL,
    token_ref TEXT UNIQUE,
    run_ref TEXT,
    job_id BIGINT NOT NULL,
    project TEXT NOT NULL,
    username TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('quoted', 'lapsed', 'unbound', 'bound', 'active', 'unknown_end', 'void',
                                         'settled', 'part_refunded', 'refunded')),
    units BIGINT NOT NULL CHECK (units >= 1),
    unit BIGINT NOT NULL CHECK (unit >= 0),
    open BIGINT NOT NULL CHECK (open >= 0),
    charged BIGINT NOT NULL CHECK (charged >= 0),
    refunded BIGINT NOT NULL CHECK (refunded >= 0 AND refunded <= charged),
    expires_s BIGINT,
    flags TEXT NOT NULL,
    parent BIGINT NOT NULL,
    version BIGINT NOT NULL,
    CHECK (state NOT IN ('quoted', 'unbound', 'bound') OR expires_s IS NOT NULL OR run_ref IS NOT NULL OR parent > 0),
    CHECK (open = 0 OR state IN ('unbound', 'bound', 'active', 'unknown_end')),
    CHECK (charged = 0 OR state IN ('settled', 'part_refunded', 'refunded'))
);
CREATE UNIQUE INDEX lien_run ON lien (run_ref) WHERE run_ref IS NOT NULL;
CREATE INDEX lien_expires ON lien (expires_s) WHERE expires_s IS NOT NULL;
CREATE INDEX lien_project ON lien (project, id);

CREATE TABLE leg (
    lien BIGINT NOT NULL REFERENCES lien (id),
    position BIGINT NOT NULL,
    allocation BIGINT NOT NULL REFERENCES allocation (id),
    open BIGINT NOT NULL CHECK (open >= 0),
    charged BIGINT NOT NULL CHECK (charged >= 0),
    refunded BIGINT NOT NULL CHECK (refunded >= 0 AND refunded <= charged),
    version BIGINT NOT NULL,
    PRIMARY KEY (lien, position)
);

CREATE TABLE txn (
    seq BIGINT PRIMARY KEY,
    at_s BIGINT NOT NULL,
    kind TEXT NOT NULL,
    lien BIGINT NOT NULL,
    key TEXT NOT NULL,
    flags TEXT NOT NULL,
    request TEXT NOT NULL,
    hash BYTEA NOT NULL
);
CREATE INDEX txn_lien ON txn (lien) WHERE lien > 0;

CREATE TABLE entry (
    seq BIGINT NOT NULL REFERENCES txn (seq),
    account BIGINT NOT NULL REFERENCES account (id),
    amount BIGINT NOT NULL CHECK (amount <> 0),
    balance BIGINT NOT NULL,
    PRIMARY KEY (seq, account)
);
CREATE INDEX entry_account ON entry (account, seq);

CREATE TABLE idempotency (
    key TEXT PRIMARY KEY,
    request_hash BYTEA NOT NULL,
    answer TEXT NOT NULL,
    at_s BIGINT NOT NULL
);

-- What was written stays.
CREATE FUNCTION append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME;
END $$;
CREATE TRIGGER txn_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON txn EXECUTE FUNCTION append_only();
CREATE TRIGGER entry_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON entry EXECUTE FUNCTION append_only();
CREATE TRIGGER idempotency_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON idempotency EXECUTE FUNCTION append_only();
-- Rows that change are never removed either, and a final state is final.
CREATE TRIGGER account_no_delete BEFORE DELETE OR TRUNCATE ON account EXECUTE FUNCTION append_only();
CREATE TRIGGER lien_no_delete BEFORE DELETE OR TRUNCATE ON lien EXECUTE FUNCTION append_only();
CREATE FUNCTION lien_final() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a final state is final';
END $$;
CREATE TRIGGER lien_final BEFORE UPDATE ON lien FOR EACH ROW
WHEN ((OLD.state IN ('void', 'lapsed') AND NEW.state <> OLD.state)
  OR (OLD.state IN ('settled', 'part_refunded', 'refunded') AND NEW.state NOT IN ('settled', 'part_refunded', 'refunded')))
EXECUTE FUNCTION lien_final();
