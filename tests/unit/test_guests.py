"""What a guest shall be, which directories it sees, and which guests are swept."""

import msgspec
import pytest

from carrel.config import Guests
from carrel.core.guests import (
    free_slot,
    group_lines,
    guest_name,
    living,
    merge,
    orphans,
    passwd_lines,
    refuse_other_image,
    refuse_other_mounts,
    resolve,
)
from carrel.core.mounts import default_mounts, merge_mounts, parse_mount
from carrel.errors import NodeFaultError, RefusedError, UsageError
from carrel.model.guest import Guest, GuestRequest, GuestSpec, GuestState, Mount
from carrel.model.job import Job, JobKey, JobState
from carrel.model.task import Person, Task

MIB = 2**20
RUN = JobKey(cluster="c", job_id=7, submit_s=9)
SITE = Guests(memory_reserve_bytes=100 * MIB, memory_min_bytes=160 * MIB, default_mounts=("home", "workdir"))
ADA = Person(  # noqa: S604  # the field shell names a program, none is started
    user="ada",
    uid=1042,
    gid=100,
    groups=((100, "users"), (7, "physics"), (9, "")),
    home="/home/ada",
    shell="/bin/bash",
)


def spec(
    request: GuestRequest | None = None,
    *,
    memory_mib: int = 1000,
    cpus: int = 4,
    task: Task | None = None,
    slot: int = 0,
    node_cpus: int = 8,
) -> GuestSpec:
    return resolve(
        request or GuestRequest(image="debian12"),
        job=Job(key=RUN, state="running", cpus=cpus, memory_bytes=memory_mib * MIB),
        task=task or Task(step="batch", cwd="/scratch/ada"),
        person=ADA,
        settings=SITE,
        node="c1",
        image_hash="f00",
        node_cpus=node_cpus,
        node_memory_bytes=8000 * MIB,
        slot=slot,
    )


def test_a_guest_per_job_has_all_of_the_job_on_the_node_less_the_reserve() -> None:
    assert spec() == GuestSpec(  # noqa: S604  # as above
        name="7.9.0",
        run=RUN,
        node="c1",
        host_name="c1",
        image="f00",
        image_name="debian12",
        per="job",
        clone="auto",
        cpus=4,
        memory_bytes=900 * MIB,
        uid=1042,
        gid=100,
        groups=(100, 7, 9),
        user="ada",
        home="/home/ada",
        shell="/bin/bash",
        mounts=(Mount(source="/home/ada", target="/home/ada"), Mount(source="/scratch/ada", target="/scratch/ada")),
        root=False,
        boot_timeout_s=120.0,
        step="",
        task=-1,
        slot=0,
        passwd=("ada:x:1042:100::/home/ada:/bin/bash",),
        group=("users:x:100:", "physics:x:7:ada"),
    )


def test_what_the_user_asked_for_wins_over_the_site() -> None:
    asked = GuestRequest(
        image="debian12", clone="full", root=True, boot_timeout_s=0.5, mounts=("/data:ro", "/home/ada:/home/ada:ro")
    )
    made = spec(asked)
    assert (made.clone, made.root, made.boot_timeout_s) == ("full", True, 0.5)
    assert [(mount.target, mount.read_only) for mount in made.mounts] == [
        ("/data", True),
        ("/home/ada", True),
        ("/scratch/ada", False),
    ]


def test_a_guest_per_task_has_its_tasks_share_and_its_own_name_and_slot() -> None:
    made = spec(GuestRequest(image="i", per="task"), task=Task(step="0", task=3, cpus_per_task=2), slot=5)
    assert (made.name, made.step, made.task, made.slot) == ("7.9.0.0.3", "0", 3, 5)
    assert (made.per, made.cpus, made.memory_bytes) == ("task", 2, 400 * MIB)


def test_a_guest_per_job_has_no_slot_of_its_own() -> None:
    assert spec(slot=5).slot == 0


def test_a_task_that_did_not_say_its_cpus_has_one() -> None:
    made = spec(GuestRequest(image="i", per="task"), memory_mib=2000, task=Task(step="0"))
    assert (made.cpus, made.memory_bytes) == (1, 400 * MIB)


def test_a_task_never_has_more_cpus_than_its_job_on_the_node() -> None:
    made = spec(GuestRequest(image="i", per="task"), task=Task(step="0", cpus_per_task=64))
    assert (made.cpus, made.memory_bytes) == (4, 900 * MIB)


def test_memory_that_slurm_does_not_limit_is_the_nodes_by_share_of_cpus() -> None:
    assert spec(memory_mib=0, cpus=2).memory_bytes == 1900 * MIB


def test_a_job_with_more_cpus_than_the_node_seems_to_have_does_not_get_more_memory_than_there_is() -> None:
    assert spec(memory_mib=0, cpus=4, node_cpus=1).memory_bytes == 7900 * MIB


def test_a_job_whose_cpus_nobody_asked_about_has_one() -> None:
    assert spec(cpus=0).cpus == 1


def test_memory_is_whole_mebibytes() -> None:
    assert (
        spec(memory_mib=1000, cpus=3, task=Task(step="0"), request=GuestRequest(image="i", per="task")).memory_bytes
        == 233 * MIB
    )


def test_the_smallest_guest_that_boots_is_made() -> None:
    assert spec(memory_mib=260).memory_bytes == 160 * MIB


def test_one_mebibyte_less_is_refused_with_what_to_ask_for() -> None:
    with pytest.raises(RefusedError) as refused:
        spec(memory_mib=259)
    assert str(refused.value) == (
        "a guest needs 160 MiB to boot and 100 around it, this job's 259 on the node leave it 159; "
        "ask for --mem=260M or more"
    )


def test_guests_per_task_that_are_too_small_name_the_memory_for_the_whole_job() -> None:
    with pytest.raises(RefusedError, match=r"leave it 0; ask for --mem=1040M or more"):
        spec(GuestRequest(image="i", per="task"), memory_mib=300, task=Task(step="0"))


def test_the_memory_that_a_refusal_names_is_enough() -> None:
    per_task = GuestRequest(image="i", per="task")
    assert spec(per_task, memory_mib=1040, task=Task(step="0")).memory_bytes == 160 * MIB
    with pytest.raises(RefusedError):
        spec(per_task, memory_mib=1039, task=Task(step="0"))


def test_a_malformed_mount_refuses_the_guest() -> None:
    with pytest.raises(UsageError, match="--guest-mount=foo"):
        spec(GuestRequest(image="i", mounts=("foo",)))


def test_guests_are_named_by_run_or_by_run_step_and_task() -> None:
    assert guest_name(RUN, per="job", task=Task(step="batch")) == "7.9.0"
    assert guest_name(RUN, per="task", task=Task(step="batch", task=1)) == "7.9.0.batch.1"


JOB = GuestRequest(
    image="debian12", per="job", clone="linked", driver="qemu", mounts=("/a",), root=True, boot_timeout_s=5.0
)


def test_a_step_takes_from_its_job_what_it_leaves_open() -> None:
    assert merge(GuestRequest(image=""), JOB, job_id=7, settings=SITE) == JOB


def test_a_step_may_say_itself_what_its_job_says_otherwise() -> None:
    step = GuestRequest(image="other", mounts=("/b",), boot_timeout_s=0.0)
    merged = merge(step, JOB, job_id=7, settings=SITE)
    assert (merged.image, merged.mounts, merged.boot_timeout_s) == ("other", ("/b",), 0.0)


def test_a_step_may_repeat_what_its_job_says() -> None:
    assert merge(JOB, JOB, job_id=7, settings=SITE) == JOB
    other = GuestRequest(image="debian12", per="task", clone="full", driver="fake")
    assert merge(other, other, job_id=7, settings=SITE) == other


def test_a_step_of_a_job_without_a_guest_stands_for_itself() -> None:
    step = GuestRequest(image="x", per="task", clone="full", driver="fake")
    assert merge(step, None, job_id=7, settings=SITE) == step


@pytest.mark.parametrize(
    ("step", "option"),
    [
        (GuestRequest(image="", per="task"), "--guest-per=task"),
        (GuestRequest(image="", clone="full"), "--guest-clone=full"),
        (GuestRequest(image="", driver="fake"), "--guest-driver=fake"),
    ],
)
@pytest.mark.parametrize("job", [JOB, GuestRequest(image="debian12")])
def test_a_step_cannot_have_another_kind_of_guest_than_its_job(
    step: GuestRequest, option: str, job: GuestRequest
) -> None:
    with pytest.raises(RefusedError, match=f"job 7 has guests of .* so a step of it cannot have {option}"):
        merge(step, job, job_id=7, settings=SITE)


def test_a_step_in_another_image_than_its_jobs_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"job 7 runs in a guest of image 'debian12', .* cannot have 'rocky9'"):
        refuse_other_image(job_id=7, asked="rocky9", asked_hash="b", has="debian12", has_hash="a")


@pytest.mark.parametrize("has_hash", ["", "a"])
def test_a_step_in_its_jobs_image_by_any_name_or_in_the_first_one_is_fine(has_hash: str) -> None:
    refuse_other_image(job_id=7, asked="latest", asked_hash="a", has="debian12", has_hash=has_hash)


def test_a_step_cannot_have_a_directory_that_its_jobs_guest_was_made_without() -> None:
    job, step = spec(), spec(GuestRequest(image="debian12", mounts=("/data:/data:ro",)))
    with pytest.raises(RefusedError, match="--guest-mount=/data: job 7 runs in a guest that was made without it"):
        refuse_other_mounts(step, job.mounts)


def test_a_step_in_another_directory_enters_the_guest_that_is_there_and_so_does_one_that_asks_for_what_it_has() -> None:
    job = spec(GuestRequest(image="debian12", mounts=("/data", "/more:ro")))
    refuse_other_mounts(spec(task=Task(step="1", cwd="/elsewhere")), job.mounts)
    refuse_other_mounts(spec(GuestRequest(image="debian12", mounts=("/data/",))), job.mounts)


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/a", Mount(source="/a", target="/a")),
        ("/a:ro", Mount(source="/a", target="/a", read_only=True)),
        ("/a:/b", Mount(source="/a", target="/b")),
        ("/a:/b:ro", Mount(source="/a", target="/b", read_only=True)),
        ("//a/./b/:/c//d/", Mount(source="/a/b", target="/c/d")),
        ("/:/host:ro", Mount(source="/", target="/host", read_only=True)),
        ("/a..b", Mount(source="/a..b", target="/a..b")),
        ("/devices", Mount(source="/devices", target="/devices")),
    ],
)
def test_a_mount_is_read_as_written(text: str, mount: Mount) -> None:
    assert parse_mount(text) == mount


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the source must be an absolute path"),
        ("foo", "the source must be an absolute path"),
        ("foo:/b", "the source must be an absolute path"),
        (":/b", "the source must be an absolute path"),
        ("/a:", "'' is neither 'ro' nor an absolute path"),
        ("/a:b", "'b' is neither 'ro' nor an absolute path"),
        ("/a:/b:rw", "'rw' is neither 'ro' nor an absolute path"),
        ("/a:b:ro", "the target must be an absolute path"),
        ("/a:/b:/c", "too many parts, write SRC[:DST][:ro]"),
        ("/a:/b:/c:ro", "too many parts, write SRC[:DST][:ro]"),
        ("/a/../etc", "the source must not contain '..'"),
        ("/a:/b/..", "the target must not contain '..'"),
        ("/", "the guest's root cannot be replaced, name a directory below it"),
        ("/a:/.", "the guest's root cannot be replaced, name a directory below it"),
        ("/proc", "/proc belongs to the guest's kernel, choose another target"),
        ("/a:/dev/shm", "/dev/shm belongs to the guest's kernel, choose another target"),
        ("/a:/sys", "/sys belongs to the guest's kernel, choose another target"),
    ],
)
def test_a_malformed_mount_is_refused_in_one_sentence(text: str, why: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_mount(text)
    assert str(refused.value) == f"--guest-mount={text}: {why}"


def targets(home: str, cwd: str, kinds: tuple[str, ...] = ("home", "workdir")) -> list[str]:
    known = [kind for kind in ("home", "workdir") if kind in kinds]
    found = default_mounts(known, home=home, cwd=cwd)
    assert all(mount.source == mount.target and not mount.read_only for mount in found)
    return [mount.target for mount in found]


def test_home_and_workdir_are_mounted_where_they_are() -> None:
    assert targets("/home/ada", "/scratch/run") == ["/home/ada", "/scratch/run"]


def test_only_the_kinds_that_the_site_wants_are_mounted() -> None:
    assert targets("/home/ada", "/scratch/run", ("home",)) == ["/home/ada"]
    assert targets("/home/ada", "/scratch/run", ("workdir",)) == ["/scratch/run"]
    assert targets("/home/ada", "/scratch/run", ()) == []


def test_a_directory_inside_another_is_not_mounted_again() -> None:
    assert targets("/home/ada", "/home/ada/run") == ["/home/ada"]
    assert targets("/home/ada", "/home") == ["/home"]
    assert targets("/home/ada", "/home/ada/") == ["/home/ada"]


def test_a_directory_whose_name_only_begins_alike_is_another() -> None:
    assert targets("/home/ada", "/home/ada2") == ["/home/ada", "/home/ada2"]


@pytest.mark.parametrize(
    "path",
    [
        *("/", "//", "/opt", "/tmp", "/tmp/", "/var", "/usr", "/usr/local/src", "/etc", "/bin", "/sbin", "/lib"),
        *("/lib32", "/lib64", "/libx32", "/proc/1", "/sys", "/dev/shm", "/run/user/7", "/boot", "relative", ""),
        *(f"/var/{name}" for name in ("cache", "lib", "local", "lock", "log", "mail", "opt", "run", "spool", "tmp")),
    ],
)
def test_no_directory_of_the_system_is_mounted_unasked(path: str) -> None:
    assert targets("/home/ada", path) == ["/home/ada"]


@pytest.mark.parametrize("path", ["/tmp/abc", "/var/tmp/abc", "/var/lib/ada", "/opt/ada", "/library", "/root", "/srv"])
def test_what_a_user_has_beside_or_below_them_is(path: str) -> None:
    assert path in targets("/home/ada", path)


def test_what_was_asked_for_wins_over_a_default_at_or_above_it() -> None:
    asked = [Mount(source="/scratch", target="/home")]
    assert merge_mounts(asked, default_mounts(("home",), home="/home/ada", cwd="/")) == tuple(asked)
    asked = [Mount(source="/x", target="/home/ada")]
    assert merge_mounts(asked, default_mounts(("home",), home="/home/ada", cwd="/")) == tuple(asked)


def test_a_mount_below_a_default_comes_after_it() -> None:
    below = Mount(source="/big", target="/home/ada/data")
    home = Mount(source="/home/ada", target="/home/ada")
    assert merge_mounts([below], [home]) == (home, below)


def test_the_same_mount_twice_is_one_and_two_at_one_target_are_refused() -> None:
    one, other = Mount(source="/a", target="/d"), Mount(source="/b", target="/d")
    assert merge_mounts([one, one], []) == (one,)
    with pytest.raises(UsageError, match="both /a and /b go to /d; give one another target"):
        merge_mounts([one, other], [])


def test_a_user_whose_fields_would_forge_a_line_has_none() -> None:
    for field in ("user", "home", "shell"):
        for bad in ("x:0", "x\ny", "x\0"):
            assert passwd_lines(msgspec.structs.replace(ADA, **{field: bad})) == ()
    assert passwd_lines(msgspec.structs.replace(ADA, user="")) == ()
    assert group_lines(msgspec.structs.replace(ADA, groups=((3, "a:b"),))) == ()
    assert group_lines(msgspec.structs.replace(ADA, user="a:b")) == ()


def test_slots_are_taken_first_fit_from_nought() -> None:
    assert free_slot([], limit=2) == 0
    assert free_slot([0, 2], limit=3) == 1


def test_a_node_without_a_free_slot_is_at_fault() -> None:
    with pytest.raises(NodeFaultError, match="all 2 guest slots of this node are taken"):
        free_slot([0, 1], limit=2)


NOW_S = 1000.0


def guest(
    *,
    age_s: float = 100.0,
    run: JobKey | None = RUN,
    per_task: bool = False,
    tasks: int = 1,
    state: GuestState = "ready",
) -> Guest:
    return Guest(
        name="g",
        node="c1",
        driver="fake",
        state=state,
        run=run,
        per="task" if per_task else "job",
        tasks=tasks,
        started_s=NOW_S - age_s,
    )


def swept(one: Guest, *jobs: Job, finished: tuple[str, ...] = ()) -> bool:
    return orphans([one], jobs, now_s=NOW_S, grace_s=10.0, finished=finished) == ("g",)


def run_is(state: JobState, slurm_state: str = "") -> Job:
    return Job(key=RUN, state=state, slurm_state=slurm_state)


@pytest.mark.parametrize("state", ["running", "suspended"])
def test_the_guest_of_a_living_run_stays(state: JobState) -> None:
    assert not swept(guest(tasks=0), run_is(state))


def test_a_guest_that_is_a_node_is_not_this_hosts_to_sweep() -> None:
    alone = msgspec.structs.replace(guest(), per="node")
    assert not swept(alone)
    assert not swept(alone, run_is("ended", "COMPLETED"))


@pytest.mark.parametrize("word", ["COMPLETING", "CONFIGURING"])
def test_the_guest_of_a_run_whose_processes_may_live_stays(word: str) -> None:
    assert not swept(guest(), run_is("ended", word))


def test_the_guest_of_a_run_that_is_over_goes_at_once() -> None:
    assert swept(guest(age_s=0.0), run_is("ended", "COMPLETED"))
    assert swept(guest(age_s=0.0, tasks=0), run_is("held"))
    assert swept(guest(age_s=0.0, tasks=0), run_is("pending"))


@pytest.mark.parametrize(
    ("state", "word", "lives"),
    [
        ("running", "RUNNING", True),
        ("suspended", "SUSPENDED", True),
        ("ended", "COMPLETING", True),
        ("ended", "CONFIGURING", True),
        ("ended", "COMPLETED", False),
        ("pending", "PENDING", False),
        ("unknown", "", False),
    ],
)
def test_processes_of_a_run_may_be_there_while_slurm_says_so(state: JobState, word: str, lives: bool) -> None:
    assert living(run_is(state, word)) is lives


@pytest.mark.parametrize("state", ["pending", "held"])
def test_the_guest_of_tasks_that_run_on_stays_though_a_crashed_slurmctld_calls_their_job_pending(
    state: JobState,
) -> None:
    assert not swept(guest(), run_is(state))


def test_a_guest_whose_run_slurm_does_not_list_goes_once_it_is_old_enough() -> None:
    assert not swept(guest(age_s=9.0))
    assert swept(guest(age_s=10.0))


def test_the_guest_of_an_earlier_run_of_the_same_job_goes() -> None:
    again = Job(key=msgspec.structs.replace(RUN, restart=1), state="running")
    assert swept(guest(), again)


def test_a_guest_that_nobody_remembers_goes_once_it_is_old_enough() -> None:
    assert not swept(guest(run=None, age_s=9.0), run_is("running"))
    assert swept(guest(run=None), run_is("running"))


def test_a_guest_per_task_goes_when_its_task_was_seen_to_leave() -> None:
    assert swept(guest(per_task=True, age_s=0.0), run_is("running"), finished=("g",))
    assert not swept(guest(per_task=True, age_s=0.0), run_is("running"), finished=("other",))


def test_a_guest_per_job_stays_when_a_task_of_it_leaves() -> None:
    assert not swept(guest(), run_is("running"), finished=("g",))


def test_a_guest_per_task_that_stays_empty_goes_unless_it_is_young_or_starting() -> None:
    assert swept(guest(per_task=True, tasks=0), run_is("running"))
    assert not swept(guest(per_task=True, tasks=0, age_s=9.0), run_is("running"))
    assert not swept(guest(per_task=True, tasks=0, state="starting"), run_is("running"))
    assert not swept(guest(per_task=True, tasks=1), run_is("running"))


def test_a_guest_per_task_that_took_long_to_boot_is_not_gone_before_its_task_enters() -> None:
    slow = msgspec.structs.replace(guest(per_task=True, tasks=0, age_s=60.0), ready_s=NOW_S - 2.0)
    assert not swept(slow, run_is("running"))
    assert swept(msgspec.structs.replace(slow, ready_s=NOW_S - 10.0), run_is("running"))
