"""What ``bank.lua`` sends, read; and that what it reads of the configuration is what we mean."""

import asyncio
import re
import time
from pathlib import Path

import pytest

from carrel import config
from carrel.core import billing
from carrel.errors import UsageError
from carrel.model.request import Request
from carrel.model.run import guests_of
from carrel.slurm import accounting, queue, submission
from carrel.slurm.associations import Associations

LUA = (Path(__file__).parents[2] / "slurm" / "bank.lua").read_text()
PART = "|x|"


def test_f3_f5_what_is_not_set_is_not_taken_for_a_number() -> None:
    fields = {
        "num_tasks": "4294967294",
        "cpus_per_task": "65534",
        "time_limit": "4294967294",
        "min_nodes": "4294967294",
    }
    assert submission.request(fields) == Request()


def test_f24_a_large_number_of_tasks_is_no_sentinel() -> None:
    assert submission.request({"num_tasks": "65534"}).tasks == 65534


@pytest.mark.parametrize("limit", ["0", "4294967295"])
def test_f6_an_infinite_time_is_unlimited(limit: str) -> None:
    assert submission.request({"time_limit": limit}).time_limit == "unlimited"


def test_f4_nodes_memory_gpus_licences_and_exclusiveness_are_read() -> None:
    found = submission.request(
        {
            "min_nodes": "2",
            "max_nodes": "3",
            "min_mem_per_cpu": "500",
            "tres_per_job": "gres:gpu:a100:2",
            "tres_per_node": "gres:gpu:1,gres:nic:2",
            "cpus_per_tres": "gres:gpu:4",
            "licenses": "matlab:2",
            "shared": "0",
            "partition": "a,b",
            "array_inx": "0-9%2",
            "req_nodes": "c[1-2]",
            "guest": "1",
            "guest_per": "task",
        }
    )
    assert (found.min_nodes, found.max_nodes, found.named_nodes, found.memory_per_cpu_mib) == (2, 3, 2, 500)
    assert (found.gpus.per_job, found.gpus.per_node, found.gpus.cpus_each) == ({"a100": 2}, {"": 1}, 4)
    assert (found.gres, found.licences, found.whole_nodes) == ({"nic": 2}, {"matlab": 2}, "--exclusive")
    assert (found.partitions, found.array_tasks, found.array_at_once) == (("a", "b"), 10, 2)
    assert found.guest
    assert found.guest_per_task


@pytest.mark.parametrize("fields", [{"num_tasks": "-1"}, {"num_tasks": "1e9"}, {"min_nodes": "99999999999"}])
def test_a_value_that_slurm_does_not_give_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        submission.request(fields)


def test_f22_only_what_an_update_names_changes() -> None:
    before = submission.request({"num_tasks": "4", "time_limit": "10", "min_mem_per_cpu": "100", "array_inx": "0-4"})
    after = submission.changed(before, {"time_limit": "20", "min_mem_per_node": "900"})
    assert (after.tasks, after.time_limit, after.array_tasks) == (4, 1200, 5)
    assert (after.memory_per_cpu_mib, after.memory_per_node_mib) == (None, 900)


def test_the_lua_and_the_configuration_have_the_same_defaults() -> None:
    block = re.search(r"local settings = \{(.*?)\}", LUA, re.DOTALL)
    assert block is not None
    told = dict(re.findall(r'(\w+) = "([^"]*)"', block[1]))
    bank = config.Bank()
    assert told == {name: str(getattr(bank, name)).replace("False", "false") for name in told}
    assert told.keys() == {"enabled", "socket", "dir", "deadline_ms", "offline", "default_account"}


def test_the_lua_is_short() -> None:
    assert len(LUA.splitlines()) <= 150


def line(**changes: str) -> str:
    fields = {
        "JobID": "6",
        "ArrayJobID": "6",
        "ArrayTaskID": "N/A",
        "UserName": "ada",
        "State": "RUNNING",
        "RestartCnt": "0",
        "SubmitTime": "100",
        "StartTime": "110",
        "EndTime": "3710",
        "TimeUsed": "1:05",
        "TimeLimit": "1:00:00",
        "Partition": "main",
        "QOS": "normal",
        "tres-alloc": "cpu=2,mem=1G,node=1,billing=2",
        "PriorityLong": "5",
        "NodeList": "c1",
        "NumTasks": "3",
        "admin_comment": "bank=abc",
        "Account": "physics",
        **changes,
    }
    return "".join(f"{value}{PART}" for value in fields.values())


def test_a_line_of_the_queue_is_read() -> None:
    (run,) = queue.read(line(), part=PART, cluster="k")
    assert (run.key.job_id, run.state, run.token, run.account) == (6, "running", "abc", "physics")
    assert (run.resources, run.elapsed_s, run.limit_s, run.start_s) == (
        {"cpu": 2, "mem": 1024, "node": 1},
        65,
        3600,
        110,
    )


def test_f9_the_tasks_of_an_array_that_wait_are_one_line() -> None:
    (run,) = queue.read(line(State="PENDING", ArrayTaskID="1-3,7%2", NodeList=""), part=PART, cluster="k")
    assert (run.array_job_id, run.waiting_tasks, run.start_s) == (6, 4, 0)


def test_a_job_that_was_taken_in_silence_has_a_guest_for_each_of_its_tasks() -> None:
    (run,) = queue.read(line(State="PENDING", admin_comment="bank=abc.t;held"), part=PART, cluster="k")
    assert guests_of(run.token, nodes=1) == 3
    assert (billing.asked(run).guest, billing.asked(run).guest_per_task) == (True, True)


def test_an_account_that_breaks_a_line_in_two_forges_no_run() -> None:
    text = line(Account="x\n6|6|N/A|root|COMPLETED|0|1|1|1|0:00")
    assert queue.read(text, part=PART, cluster="k") == []


def record(**changes: str) -> str:
    fields = {
        "JobIDRaw": "7",
        "JobID": "6_1",
        "State": "CANCELLED by 0",
        "User": "ada",
        "Partition": "main",
        "QOS": "normal",
        "Submit": "100",
        "Start": "110",
        "End": "120",
        "ElapsedRaw": "8",
        "AllocTRES": "billing=1,cpu=1,mem=512M,node=1",
        "AdminComment": "bank=abc",
        "Account": "physics",
        **changes,
    }
    return PART.join(fields.values())


def test_f16_a_record_is_known_by_its_own_job_id_not_by_its_place_in_an_array() -> None:
    (run,) = accounting.read(record(), part=PART).ended
    assert (run.job_id, run.array_job_id, run.state, run.elapsed_s, run.token) == (7, 6, "CANCELLED", 8, "abc")


@pytest.mark.parametrize("changes", [{"Partition": ""}, {"AllocTRES": ""}, {"End": "Unknown"}, {"State": "RUNNING"}])
def test_f31_a_record_that_is_not_whole_is_not_charged(changes: dict[str, str]) -> None:
    found = accounting.read(record(**changes), part=PART)
    assert found.ended == []
    assert found.going == {(7, 100)}


def test_f32_a_broken_record_does_not_stop_the_others() -> None:
    found = accounting.read(f"nonsense\n{record()}\n{record(AllocTRES='cpu=many')}", part=PART)
    assert len(found.ended) == 1
    assert len(found.broken) == 2


def test_f28_sacct_is_asked_in_utc_and_for_seconds_whatever_the_time_zone_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sacct = tmp_path / "sacct"
    sacct.write_text('#!/bin/sh\necho "$TZ $SLURM_TIME_FORMAT $*" >"$0.asked"\n')
    sacct.chmod(0o755)
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        asyncio.run(accounting.since(config.Slurm(bin_dir=str(tmp_path)), 86400))
    finally:
        monkeypatch.undo()
        time.tzset()
    asked = (tmp_path / "sacct.asked").read_text().split()
    assert asked[:2] == ["UTC", "%s"]
    assert asked[-2:] == ["-S", "1970-01-02T00:00:00"]


def test_who_may_charge_what_and_with_which_qos_is_read_at_once() -> None:
    known = Associations("physics|ada||high|high,low\nphysics|bob|gpu||low\nphysics||||normal\nart|ada|||a,b\n")
    assert known.member("ada", "physics")
    assert not known.member("bob", "art")
    assert known.default_qos("ada", "physics", ("main",)) == ("high",)
    assert known.default_qos("bob", "physics", ("main",)) == ()
    assert known.default_qos("ada", "art", ("main",)) == ("normal",)
    assert known.accounts() == {"physics", "art"}
    assert not Associations("")
