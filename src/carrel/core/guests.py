"""What a guest shall be, and which guests shall go: the node daemon's decisions, without its sockets."""

import re
from collections.abc import Collection, Sequence

import msgspec

from carrel.config import Guests
from carrel.core.lifecycle import DestroyGuest, next_actions
from carrel.core.mounts import default_mounts, merge_mounts, parse_mount
from carrel.errors import NodeFaultError, RefusedError
from carrel.model.guest import Guest, GuestRequest, GuestSpec, Mount, Per
from carrel.model.job import Job, JobKey
from carrel.model.lien import WAIVED
from carrel.model.task import Person, Task

__all__ = [
    "free_slot",
    "group_lines",
    "guest_name",
    "living",
    "merge",
    "orphans",
    "parse_mount",  # of mounts; whoever reads a request reads its mounts
    "passwd_lines",
    "refuse_other_image",
    "refuse_other_mounts",
    "resolve",
]

_MIB = 2**20
_UNFIT_FOR_A_DATABASE = re.compile(r"[:\n\0]")


def guest_name(run: JobKey, *, per: Per, task: Task) -> str:
    """Return the guest's name on its node.

    >>> guest_name(JobKey(cluster="c", job_id=7, submit_s=9), per="task", task=Task(step="0", task=3))
    '7.9.0.0.3'
    """
    return f"{run}.{task.step}.{task.task}" if per == "task" else str(run)


def merge(step: GuestRequest, job: GuestRequest | None, *, job_id: int, settings: Guests) -> GuestRequest:
    """Return the step's request with what it leaves open taken from the job's own; ``None``: the job asked for none.

    Raises:
        RefusedError: the step wants another kind of guest than its job has; a node carries one kind for a job.
    """
    if job is None:
        return step
    for option, own, theirs in (
        ("per", step.per, job.per or settings.per),
        ("clone", step.clone, job.clone or settings.clone),
        ("driver", step.driver, job.driver or settings.driver),
    ):
        if own and own != theirs:
            raise RefusedError(
                f"job {job_id} has guests of --guest-{option}={theirs}, so a step of it cannot have "
                f"--guest-{option}={own}; leave the option out of the step, or give it to the job"
            )
    return GuestRequest(
        image=step.image or job.image,
        per=step.per or job.per,
        clone=step.clone or job.clone,
        driver=step.driver or job.driver,
        mounts=step.mounts or job.mounts,
        root=step.root or job.root,
        boot_timeout_s=job.boot_timeout_s if step.boot_timeout_s is None else step.boot_timeout_s,
    )


def refuse_other_image(*, job_id: int, asked: str, asked_hash: str, has: str, has_hash: str) -> None:
    """Refuse a step that asks for another image than its job's guest was made from.

    Raises:
        RefusedError: the hashes differ; two names of one image are the same image.
    """
    if has_hash and asked_hash != has_hash:
        raise RefusedError(
            f"job {job_id} runs in a guest of image '{has}', so a step of it cannot have '{asked}'; "
            "leave --guest out of the step, or submit a job of its own"
        )


def refuse_other_mounts(wanted: GuestSpec, has: Collection[Mount]) -> None:
    """Refuse a step that names a directory which its job's guest was made without; one is only mounted at the start.

    Raises:
        RefusedError: ``has``, the guest's mounts, lacks one that the user named.
    """
    missing = [mount for mount in wanted.asked_mounts if mount not in has]
    if missing:
        raise RefusedError(
            f"--guest-mount={missing[0].source}: job {wanted.run.job_id} runs in a guest that was made without it; "
            "give it to the job (sbatch, salloc) or to its first step"
        )


def resolve(
    request: GuestRequest,
    *,
    job: Job,
    task: Task,
    person: Person,
    settings: Guests,
    node: str,
    image_hash: str,
    node_cpus: int,
    node_memory_bytes: int,
    slot: int = 0,
) -> GuestSpec:
    """Return the guest that this task enters.

    Args:
        request: What the user asked for, the job's own request already merged in.
        job: The run, with its CPUs and memory on this node.
        task: The task at the door; the first one decides what a guest per job mounts.
        person: Whom the job runs as.
        settings: The site's.
        node: This node.
        image_hash: What ``request.image`` resolved to.
        node_cpus: CPUs of this node, for the share of a job whose memory Slurm does not limit.
        node_memory_bytes: Memory of this node, for the same.
        slot: Slot on the node, for a guest per task.

    Raises:
        UsageError: a mount is malformed.
        RefusedError: the guest would be too small to boot.
    """
    per = request.per or settings.per
    job_cpus = max(1, job.cpus)
    cpus = min(job_cpus, max(1, task.cpus_per_task)) if per == "task" else job_cpus
    asked = [parse_mount(text) for text in request.mounts]
    defaults = default_mounts(settings.default_mounts, home=person.home, cwd=task.cwd)
    return GuestSpec(
        name=guest_name(job.key, per=per, task=task),
        run=job.key,
        node=node,
        host_name=node,
        image=image_hash,
        image_name=request.image,
        per=per,
        clone=request.clone or settings.clone,
        cpus=cpus,
        memory_bytes=guest_memory(
            job.memory_bytes or node_memory_bytes * job_cpus // max(job_cpus, node_cpus),
            cpus=cpus,
            job_cpus=job_cpus,
            settings=settings,
        ),
        uid=person.uid,
        gid=person.gid,
        groups=tuple(gid for gid, _ in person.groups),
        user=person.user,
        home=person.home,
        shell=person.shell,
        mounts=merge_mounts(asked, defaults),
        asked_mounts=tuple(asked),
        root=request.root,
        boot_timeout_s=settings.boot_timeout_s if request.boot_timeout_s is None else request.boot_timeout_s,
        step=task.step if per == "task" else "",
        task=task.task if per == "task" else -1,
        slot=slot if per == "task" else 0,
        passwd=passwd_lines(person),
        group=group_lines(person),
    )


def guest_memory(job_memory_bytes: int, *, cpus: int, job_cpus: int, settings: Guests) -> int:
    """Return a guest's share of the job's memory, less what its emulator needs, in whole MiB.

    Raises:
        RefusedError: too little is left for a guest to boot.
    """
    memory_bytes = (job_memory_bytes * cpus // job_cpus - settings.memory_reserve_bytes) // _MIB * _MIB
    if memory_bytes < settings.memory_min_bytes:
        needed_bytes = -(-(settings.memory_min_bytes + settings.memory_reserve_bytes) * job_cpus // cpus)
        raise RefusedError(
            f"a guest needs {_mib(settings.memory_min_bytes)} MiB to boot and {_mib(settings.memory_reserve_bytes)} "
            f"around it, this job's {_mib(job_memory_bytes)} on the node leave it {max(0, memory_bytes) // _MIB}; "
            f"ask for --mem={_mib(needed_bytes)}M or more"
        )
    return memory_bytes


def _mib(amount_bytes: int) -> int:
    return -(-amount_bytes // _MIB)


def passwd_lines(person: Person) -> tuple[str, ...]:
    """Return the user's line for the guest's ``/etc/passwd``; none where a field cannot stand in one.

    >>> passwd_lines(Person(user="ada", uid=1042, gid=100, home="/home/ada", shell="/bin/bash"))
    ('ada:x:1042:100::/home/ada:/bin/bash',)
    """
    if not person.user or any(_UNFIT_FOR_A_DATABASE.search(text) for text in (person.user, person.home, person.shell)):
        return ()
    return (f"{person.user}:x:{person.uid}:{person.gid}::{person.home}:{person.shell}",)


def group_lines(person: Person) -> tuple[str, ...]:
    """Return a line for the guest's ``/etc/group`` for each of the user's groups that has a name.

    >>> group_lines(Person(user="ada", uid=1042, gid=100, groups=((100, "users"), (7, "physics"))))
    ('users:x:100:', 'physics:x:7:ada')
    """
    return tuple(
        # The primary group comes from the passwd line; naming the user again would list it twice in `id`.
        f"{name}:x:{gid}:{'' if gid == person.gid else person.user}"
        for gid, name in person.groups
        if name and not _UNFIT_FOR_A_DATABASE.search(name + person.user)
    )


def free_slot(taken: Collection[int], *, limit: int) -> int:
    """Return the lowest slot of the node that no guest has.

    Raises:
        NodeFaultError: all are taken; guests of earlier jobs were left behind, or Slurm overcommits the node.
    """
    for slot in range(limit):
        if slot not in taken:
            return slot
    raise NodeFaultError(f"all {limit} guest slots of this node are taken; see: carrel guest list")


def living(job: Job) -> bool:
    """Tell whether processes of the run may still be on its nodes.

    A cancelled job is COMPLETING while its script has KillWait to clean up, and CONFIGURING while its prolog runs.
    """
    return job.state in {"running", "suspended"} or job.slurm_state in {"COMPLETING", "CONFIGURING"}


def orphans(
    guests: Sequence[Guest],
    jobs: Sequence[Job],
    *,
    now_s: float,
    grace_s: float,
    finished: Collection[str] = (),
) -> tuple[str, ...]:
    """Return the names of the guests that the sweep destroys: those whose run's plan says so.

    A look at Slurm that failed has no ``jobs`` to pass, so nothing is swept on it.

    Args:
        guests: All that exist on this node.
        jobs: All that Slurm listed; looked at *before* the guests, or a new guest may lack its job.
        now_s: Time of day.
        grace_s: A guest younger than this may have a job that Slurm does not list yet, or an owner not yet noted.
        finished: Names of the guests per task that the daemon saw their task leave.
    """
    runs = {job.key: job for job in jobs}

    def orphaned(guest: Guest) -> bool:
        if guest.per == "node":  # it is there before its job is; carrelctld says when it goes
            return False
        young = now_s - guest.started_s < grace_s
        if guest.run is None or guest.run not in runs:
            return not young
        job = runs[guest.run]
        if living(job):  # also while it is COMPLETING, which the plan would take for its end
            job = msgspec.structs.replace(job, state="running")
        if any(isinstance(action, DestroyGuest) for action in next_actions(job, WAIVED, guest)):
            return True
        if job.state in {"pending", "held"}:
            # Requeued. But a slurmctld that crashed may call a job pending whose tasks still run.
            return guest.tasks == 0
        if guest.per != "task":
            return False
        # After a restart the daemon saw nobody leave: a guest per task that stays empty was left. However long it
        # took to boot, its task is given some time to enter.
        fresh = now_s - (guest.ready_s or guest.started_s) < grace_s
        empty = guest.state != "starting" and guest.tasks == 0 and not fresh
        return guest.name in finished or empty

    return tuple(guest.name for guest in guests if orphaned(guest))
