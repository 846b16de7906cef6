"""The ledger in a database: tables, the one writer, and the check of all invariants."""
