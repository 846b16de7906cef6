"""What a check of this machine, or of the cluster, says."""

import msgspec


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    ok: bool
    what: str
    next: str = ""
    node: str = ""


def ok(what: str) -> Check:
    """Return that something is as it should be."""
    return Check(ok=True, what=what)


def problem(what: str, then: str) -> Check:
    """Return that something is not, and what to do next."""
    return Check(ok=False, what=what, next=then)
