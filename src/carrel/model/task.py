"""A task of a step, and the person it runs as: what ``carrel-enter`` and the host's user database say of them."""

import msgspec


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One task that wants into its guest."""

    step: str
    """``batch``, ``interactive``, or the step's number."""
    task: int = 0
    """Global rank in the step."""
    ntasks: int = 1
    cpus_per_task: int = 0
    """0: Slurm did not say, which means one."""
    cwd: str = "/"


class Person(msgspec.Struct, frozen=True, kw_only=True):
    """A user as the host knows them."""

    user: str
    uid: int
    gid: int
    groups: tuple[tuple[int, str], ...] = ()
    """Every group, the primary one too, with its name; an empty name: the host has none for it."""
    home: str = "/"
    shell: str = "/bin/sh"
