"""Arrays whose tasks have guests that are nodes: each task is admitted by itself.

Slurm keeps the tasks of an array that wait as one job, and makes a job of its own of each that is changed alone. What
is one job can have only one reservation, so a task becomes a job before it looks for room, and no sooner than there is
something to do with it: thousands of jobs that wait would cost slurmctld more than the one that they were. What its
owner allows to run at once (``%``) is also what is begun at once, since Slurm starts no more.
"""

from carrel.core.guestdeeds import Split, Tell
from carrel.core.guestworld import World
from carrel.model.pool import PoolJob

IN_LINE_MAX = 8
"""Of one array's tasks, so many stand in line for room: enough that a site's hosts fill up in a few looks."""


def next_tasks(world: World, job: PoolJob) -> list[Split | Tell]:
    """Return what is due before the first of these tasks may look for room; nothing: it may, as a job by itself."""
    if not job.tasks or job.key in world.begun:
        return []
    others = [
        other
        for other in world.look.jobs
        if other.job.array_job_id == job.job.array_job_id
        and other.key != job.key
        and other.job.state != "ended"
        and other.key not in world.given_up
    ]
    if job.at_once and len(others) >= job.at_once:
        return [Tell(job.key, f"waits for other tasks of its array, of which {job.at_once} run at a time")]
    if len(job.tasks) == 1:
        return []
    in_line = sum(other.job.state == "held" and other.key not in world.begun for other in others)
    count = IN_LINE_MAX - in_line
    if job.at_once:
        count = min(count, job.at_once - len(others))
    if count <= 0:
        return [Tell(job.key, "waits until tasks of its array before it have room")]
    return [Split(job.key, job.tasks[:count], "each task has guests of its own")]
