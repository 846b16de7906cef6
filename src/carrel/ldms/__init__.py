"""LDMS: driving the daemons of a site that samples with it."""
