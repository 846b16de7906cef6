"""What a job asked for, from the real Lua to what is read of Slurm's text: whatever its owner calls it."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from carrel import process
from carrel.slurm.pool import parsed_wish

LUA = Path(__file__).parents[2] / "slurm" / "guest_node.lua"
ODD = "a 'b' \"c\"; $(touch /tmp/x)\nAdminComment=carrel:image=evil&root=yes"
ASK = """
slurm = { log_user = print }
local job = { work_dir = os.getenv("ODD"), name = os.getenv("ODD"), spank_job_env_size = 3, spank_job_env = {
  [0] = "CARREL_JOB_IMAGE=debian12", [1] = "CARREL_JOB_PER=node", [2] = "CARREL_JOB_MOUNT=" .. os.getenv("ODD") } }
assert(dofile(os.getenv("LUA")).submit(job))
io.write(job.admin_comment)
"""
SUBMIT = """
slurm = { log_user = function(form, ...) io.write(form:format(...)) end }
local job = { work_dir = "/", spank_job_env_size = 2, [os.getenv("FIELD")] = os.getenv("VALUE"),
  spank_job_env = { [0] = "CARREL_JOB_IMAGE=debian12", [1] = "CARREL_JOB_PER=node" } }
io.write(tostring(dofile(os.getenv("LUA")).submit(job)))
"""
IN_PARTITION = """
slurm = { log_user = function(form, ...) io.write(form:format(...)) end }
local job = { work_dir = "/", partition = os.getenv("PARTITION"), spank_job_env_size = 1,
  spank_job_env = { [0] = "CARREL_JOB_IMAGE=debian12" } }
assert(dofile(os.getenv("LUA")).submit(job, { guests = {} }))
io.write(job.priority or "its own", " ", job.admin_comment or "")
"""
NO_PARTITION = """
slurm = { log_user = function(form, ...) io.write(form:format(...)) end }
local job = { spank_job_env_size = 1, spank_job_env = { [0] = "CARREL_JOB_PER=" .. os.getenv("PER") } }
io.write(tostring(dofile(os.getenv("LUA")).submit(job, { main = {} })))
"""
MODIFY = """
slurm = { log_user = function(form, ...) io.write(form:format(...)) end }
local job = { partition = "guests", job_id = 7 }
local change = { [os.getenv("FIELD")] = os.getenv("VALUE") }
io.write(tostring(dofile(os.getenv("LUA")).modify(change, job, 1001)))
"""
AS_SLURM_USER = """
slurm = { log_user = function(form, ...) io.write(form:format(...)) end }
local change, job, uid = { priority = 1 }, { partition = "guests", job_id = 7 }, tonumber(os.getenv("CALLER"))
io.write(tostring(loadstring(os.getenv("CODE"))().modify(change, job, uid)))
"""


pytestmark = pytest.mark.skipif(shutil.which("lua5.1") is None, reason="no lua5.1")


def lua(script: str, env: Mapping[str, str]) -> str:
    return process.run(["lua5.1", "-e", script], env={"LUA": str(LUA), **env}).strip()


def test_what_is_odd_in_a_request_goes_through_lua_and_slurms_text_unharmed() -> None:
    comment = lua(ASK, {"ODD": ODD})
    assert not set(comment) & set(" '\";$\n")
    for mark in ("", "bank=5fe9.g;", "bank=5fe9.g;held;"):
        wish = parsed_wish(f"{mark}{comment}|")
        assert wish is not None
        assert (wish.cwd, wish.request.mounts, wish.request.image) == (ODD, tuple(ODD.split("\n")), "debian12")
        assert not wish.request.root


@pytest.mark.parametrize(
    ("field", "option"),
    [("req_nodes", "--nodelist"), ("exc_nodes", "--exclude"), ("reservation", "--reservation"), ("partition", "")],
)
def test_what_names_nodes_that_are_there_is_refused_with_a_sentence(field: str, option: str) -> None:
    said = lua(SUBMIT, {"FIELD": field, "VALUE": "x"})
    assert said.startswith("carrel: --guest-per=node: ")
    assert option in said
    assert said.endswith("outfalse")


def test_in_the_partition_of_guests_a_guest_is_a_node_without_a_word_and_elsewhere_it_is_none() -> None:
    priority, comment = lua(IN_PARTITION, {"PARTITION": "guests"}).split(" ", 1)
    wish = parsed_wish(comment)
    assert priority == "0", "it is held until its guest is there"
    assert wish is not None
    assert (wish.request.image, wish.request.per) == ("debian12", "node")
    assert lua(IN_PARTITION, {"PARTITION": "main"}) == "its own"


def test_a_site_without_the_partition_of_guests_says_so_to_who_needs_it_and_to_nobody_else() -> None:
    said = lua(NO_PARTITION, {"PER": "node"})
    assert said.startswith("carrel: --guest-per=node: this cluster has no partition 'guests' that you may use")
    assert "ask an administrator (docs/how-to/guests-as-nodes.md" in said
    assert said.endswith("false")
    assert lua(NO_PARTITION, {"PER": "job"}) == "true"


@pytest.mark.parametrize("field", ["array_inx", "licenses", "dependency", "name"])
def test_arrays_and_what_says_when_a_job_runs_are_its_owners_to_choose(field: str) -> None:
    assert lua(SUBMIT, {"FIELD": field, "VALUE": "1"}) == "true"
    assert lua(MODIFY, {"FIELD": field, "VALUE": "1"}) == "true"


@pytest.mark.parametrize(
    "field", ["exc_nodes", "req_nodes", "reservation", "priority", "pn_min_memory", "admin_comment"]
)
def test_what_a_job_was_admitted_by_is_not_its_owners_to_change(field: str) -> None:
    assert "scancel it and submit it anew" in lua(MODIFY, {"FIELD": field, "VALUE": "1"})


def test_what_a_job_was_admitted_by_is_roots_to_change_and_slurm_users_who_may_be_carrelctld() -> None:
    own = os.getuid()
    uid = own or 65534  # root would be let through by its number
    as_slurm_user = [] if own else ["setpriv", f"--reuid={uid}", "--clear-groups", "--"]
    command = [*as_slurm_user, "lua5.1", "-e", AS_SLURM_USER]
    said = {
        caller: process.run(command, env={"CODE": LUA.read_text(), "CALLER": str(caller)})
        for caller in (0, uid, uid + 1)
    }
    assert (said[0], said[uid]) == ("true", "true")
    assert said[uid + 1].endswith("submit it anewfalse")
