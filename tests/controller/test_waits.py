"""Jobs whose guests are Slurm nodes, and nobody makes the guests: each says why it waits, or is refused."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from carrel.daemons.knock import Knock
from carrel.daemons.unserved import WHY
from carrel.hosts.table import HostTable
from carrel.sandbox.cluster import Sandbox
from carrel.testing.asnodes import OPTIONS, of_job
from carrel.testing.guests import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.root]

WAITS_S = 60.0


@pytest.fixture(scope="module")
def box(sandbox_factory: Callable[..., Sandbox]) -> Sandbox:
    """One ordinary node and a host that is never asked to carry a guest."""
    return sandbox_factory(nodes=1, hosts=1)


class Submitted(NamedTuple):
    """What ``sbatch`` said."""

    job_id: int
    said: str


@contextmanager
def settings(box: Sandbox, **changed: str) -> Iterator[None]:
    """Have other settings in ``[guest_nodes]``, for a carrelctld that starts now; it is restarted afterwards."""
    path = box.layout.carrel_conf
    before = path.read_text()
    lines = [f"{key} = {json.dumps(value)}" for key, value in changed.items()]
    head, mark, tail = before.partition("[guest_nodes]\n")
    kept = [line for line in tail.splitlines() if line.partition(" ")[0] not in changed]
    path.write_text("\n".join([head + mark.strip(), *lines, *kept]) + "\n")
    try:
        yield
    finally:
        path.write_text(before)
        box.restart("carrelctld")


def submit(box: Sandbox, *options: str) -> Submitted:
    done = box.run(["sbatch", "--parsable", *OPTIONS, "-D/tmp", "-o/dev/null", *options, "--wrap=true"])
    return Submitted(int(done.stdout or 0), done.stderr)


def checked(box: Sandbox) -> dict[str, str]:
    """Return what ``carrel node check`` finds wrong, each with what to do next."""
    found = map(json.loads, box.run(["carrel", "node", "check", "--json"]).stdout.splitlines())
    return {each["what"]: each["next"] for each in found if not each["ok"]}


def shown(box: Sandbox, job_id: int) -> str:
    done = box.run(["carrel", "job", "show", str(job_id), "--json"])
    why: str = json.loads(done.stdout)["why"]
    return why


def test_without_carrelctld_a_job_says_from_the_first_moment_what_it_waits_for(box: Sandbox) -> None:
    box.kill("carrelctld")
    try:
        job_id, _ = submit(box)
        assert of_job(box, job_id, "%k") == "carrel: waits for its guest, which carrelctld makes"
        assert shown(box, job_id).startswith("waits for carrelctld to make its guest: carrelctld at")
        assert "jobs with --guest-per=node wait for carrelctld, which does not answer" in checked(box)
        own = submit(box, "--hold").job_id
        assert of_job(box, own, "%k") == "carrel: waits for its owner to release it"
        box.run(["scancel", str(own), str(job_id)])
    finally:
        box.start("carrelctld")


def test_slurmctld_knocks_for_a_job_whose_guest_is_a_node_and_for_no_other(box: Sandbox) -> None:
    heard: list[str] = []

    async def listen() -> None:
        submitted = ""
        knock = Knock(box.layout.run / "knock", lambda: heard.append(submitted))
        knock.begin()
        try:
            for submitted in ("plain", "guest"):
                options = OPTIONS if submitted == "guest" else ()
                words = ["sbatch", *options, "-D/tmp", "-o/dev/null", "--begin=now+1hour", "--wrap=true"]
                done = await asyncio.to_thread(box.run, words)
                assert done.returncode == 0, done.stderr
            async with asyncio.timeout(WAITS_S):
                while not heard:  # noqa: ASYNC110  # it was opened before sbatch was answered
                    await asyncio.sleep(0.01)
        finally:
            knock.end()

    box.kill("carrelctld")  # as it begins to listen it opens the file itself
    try:
        asyncio.run(listen())
        box.run(["scancel", "--user=root"])
    finally:
        box.start("carrelctld")
    assert set(heard) == {"guest"}


def test_where_no_host_is_set_a_job_is_refused_and_one_that_waits_already_is_told(box: Sandbox) -> None:
    box.kill("carrelctld")
    job_id, _ = submit(box)
    with settings(box, hosts=""):
        box.start("carrelctld")
        assert "no host of this cluster carries such guests; take --guest-per=job" in submit(box).said
        wait_for(lambda: of_job(box, job_id, "%k") == f"carrel: {WHY}", WAITS_S)
        assert shown(box, job_id) == WHY
        (then,) = [then for what, then in checked(box).items() if "no host is set to carry them" in what]
        assert then.endswith("restart carrelctld, then: carrel host add h1")
        box.run(["scancel", str(job_id)])


def test_a_carrelctld_that_was_started_with_other_settings_is_found(box: Sandbox) -> None:
    with settings(box, partition="elsewhere", hosts="h1"):
        assert "this cluster has no partition 'elsewhere' that you may use" in submit(box).said
        found = " ".join(checked(box))
        assert "partition elsewhere (guest_nodes.partition), whose nodes are guests, cannot be seen" in found
        assert "carrelctld looks at partition guests, and guest_nodes.partition is elsewhere" in found
        box.restart("carrelctld")
        wait_for(lambda: any("carrelctld does nothing for guests" in what for what in checked(box)), WAITS_S)


def test_a_host_that_is_not_in_the_table_is_what_an_administrator_is_told_to_add(box: Sandbox) -> None:
    table = HostTable(box.layout.hosts_table)
    table.remove("h1")
    job_id, _ = submit(box)
    try:
        wait_for(lambda: of_job(box, job_id, "%k") == "carrel: there is no host; see: carrel host add", WAITS_S)
        assert shown(box, job_id) == "there is no host; see: carrel host add"
        assert checked(box)["no guest goes to h1: not in the table of hosts"] == "carrel host add h1"
        # One that nobody speaks for is none to wait for, nor one to begin a guest on.
        box.run(["carrel", "host", "add", "c1", "--cpus=4", "--memory=4G"])
        wait_for(lambda: "guest_nodes names no host c1" in of_job(box, job_id, "%k"), WAITS_S)
        assert not table.places()
        (then,) = [then for what, then in checked(box).items() if "no guest goes to c1" in what]
        assert then.endswith("carrel host remove c1")
    finally:
        box.run(["scancel", str(job_id)])
