"""Whose the samples of a job are, and which group may read them too."""

import functools
import grp
import os
import pwd

from carrel.errors import CarrelError
from carrel.model.job import Job


def of_job(job: Job) -> tuple[str, int]:
    """Return the user's name and group, from the password database where Slurm did not say them.

    Raises:
        CarrelError: this node does not know the user.
    """
    if job.user and job.uid >= 0 and job.gid >= 0:
        return job.user, job.gid  # the database may be far away, and all jobs wait for the sampler's thread
    try:
        entry = pwd.getpwuid(job.uid)
    except (KeyError, OverflowError) as error:
        raise CarrelError(f"job {job.key}: there is no uid {job.uid} on this node to own its samples") from error
    return job.user or entry.pw_name, job.gid if job.gid >= 0 else entry.pw_gid


def readers(group: str, own_gid: int) -> int:
    """Return the group that may read; a user's own may be that of all users, so without a word it is root's.

    Raises:
        CarrelError: this node does not know the group.
    """
    if group:
        return _gid_of(group)
    return 0 if os.geteuid() == 0 else own_gid


@functools.cache
def _gid_of(group: str) -> int:
    """Return a group's number; the database may be far away, so it is asked once."""
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise CarrelError(f"metrics.readers = {group!r}: there is no such group on this node") from error
