"""A burst of jobs beyond what the hosts of guests carry, on hosts with addresses of their own as in a cluster."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from carrel.sandbox.cluster import Sandbox
from carrel.testing.asnodes import OPTIONS, events, names_rest, nothing_of_nodes_is_left, rooms
from carrel.testing.guests import job_state, submit, wait_for
from carrel.testing.sandbox import User

pytestmark = [pytest.mark.slurm, pytest.mark.guest, pytest.mark.root]

JOBS, HOSTS, EACH = 30, 3, 4


@pytest.fixture
def box(sandbox_factory: Callable[..., Sandbox]) -> Iterator[Sandbox]:
    made = sandbox_factory(nodes=1, hosts=HOSTS, netns=True)
    yield made
    made.down()


def test_a_burst_beyond_what_the_hosts_carry_runs_to_its_end_and_never_above_it(box: Sandbox, user: User) -> None:
    wait_for(lambda: [each["state"] for each in hosts(box)] == ["up"] * HOSTS)
    slurmctld, before = box.pid("slurmctld"), hosts(box)
    box.kill("carrelctld")  # so that they come at once, however long it takes to submit them
    try:
        jobs = [submit(box, "#!/bin/sh\nsleep 1\n", *OPTIONS, user=user)[0] for _ in range(JOBS)]
    finally:
        box.start("carrelctld")
    most: dict[str, int] = {}

    def ended() -> bool:
        now = {str(number): len(list(box.dir.glob(f"nodes/h{number}/guests/*"))) for number in range(1, HOSTS + 1)}
        for where, count in (now | {"all": sum(now.values()), "rooms": rooms(box)}).items():
            most[where] = max(most.get(where, 0), count)
        return {job_state(box, job_id) for job_id in jobs} == {"COMPLETED"}

    wait_for(ended)
    assert max(most.values()) <= HOSTS * EACH, most
    assert most["rooms"] > (HOSTS - 1) * EACH, f"there is room for {HOSTS * EACH} guests: {most}"
    assert all(most[str(number)] <= EACH for number in range(1, HOSTS + 1)), most
    placed = [line for job_id in jobs for line in events(box, job_id) if line.startswith("guest-placed")]
    assert sorted({line.split()[2] for line in placed}) == [f"h{number}" for number in range(1, HOSTS + 1)]
    nothing_of_nodes_is_left(box)
    names_rest(box)
    wait_for(lambda: hosts(box) == before)
    assert box.pid("slurmctld") == slurmctld, "slurmctld was restarted"


def hosts(box: Sandbox) -> list[dict[str, Any]]:
    """Return the hosts' table as an administrator sees it."""
    done = box.run(["carrel", "host", "list", "--json"])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
