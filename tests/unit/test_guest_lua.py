"""What ``guest_node.lua`` reads of ``carrel.toml``, which it knows as text, and what it says of it at submission."""

import os
import shutil
from pathlib import Path

import pytest

from carrel import config, process

LUA = Path(__file__).parents[2] / "slurm" / "guest_node.lua"
SUBMIT = """
slurm = { log_user = function(form, ...) io.write(form:format(...)) end }
local lua = dofile(os.getenv("LUA"))
local job = { work_dir = "/", spank_job_env_size = 2, partition = os.getenv("PARTITION"),
  priority = tonumber(os.getenv("PRIORITY")), comment = os.getenv("COMMENT"),
  spank_job_env = { [0] = "CARREL_JOB_IMAGE=debian12", [1] = "CARREL_JOB_PER=" .. os.getenv("PER") } }
if os.getenv("LATER") then
  local file = io.open(os.getenv("CARREL_CONFIG"), "w")
  file:write(os.getenv("LATER"))
  file:close()
end
io.write(tostring(lua.submit(job, { guests = {}, vms = {} })), "|", job.partition or "", "|", job.comment or "")
"""
WAITS = "carrel: waits for its guest, which carrelctld makes"

pytestmark = pytest.mark.skipif(shutil.which("lua5.1") is None, reason="no lua5.1")


def submitted(tmp_path: Path, text: str | None, *, per: str = "node", **env: str) -> list[str]:
    """Return what the user reads with whether the job goes on, its partition, its comment."""
    path = tmp_path / "carrel.toml"
    if text is not None:
        path.write_text(text)
    told = {"LUA": str(LUA), "CARREL_CONFIG": str(path), "PER": per, **env}
    return process.run(["lua5.1", "-e", SUBMIT], env=told).split("|")


@pytest.mark.parametrize(
    "text",
    [
        '[guest_nodes]\npartition = "vms" # ours\nhosts = "h[1-40]"\n',
        "[ guest_nodes ]\nhosts='h1'\npartition='vms'\n[metrics]\nenabled = false\n",
        '[guest_nodes]\npartition = "vms"\n[guest_nodes.remote]\nvsphere = "esx-1"\n',
        '[guest_nodes]\npartition = "vms"\nhosts = ""\nremote = { vsphere = "esx-1" }\n',
        '["guest_nodes"]\npartition = "vms"\nremote.vsphere = "esx-1"\n',
    ],
)
def test_partition_and_hosts_are_read_as_toml_may_have_them(tmp_path: Path, text: str) -> None:
    assert submitted(tmp_path, text) == ["true", "vms", WAITS]
    settings = config.load(tmp_path / "carrel.toml").guest_nodes
    assert (settings.partition, bool(settings.hosts or settings.remote)) == ("vms", True)


@pytest.mark.parametrize(
    "text", ["", '[guest_nodes]\nhosts = "" # none yet\n', '[guest_nodes]\nremote = {}\n[other]\nhosts = "h1"\n']
)
def test_a_job_that_no_host_could_ever_carry_is_refused_at_once(tmp_path: Path, text: str) -> None:
    said = submitted(tmp_path, text)
    assert said[0].startswith(
        "carrel: --guest-per=node: no host of this cluster carries such guests; take --guest-per=job"
    )
    assert f"neither guest_nodes.hosts nor guest_nodes.remote is set in {tmp_path}" in said[0]
    assert (said[0].endswith("false"), said[1:]) == (True, ["", ""])


@pytest.mark.parametrize("text", [None, 'guest_nodes = { hosts = "h1" }\n'])
def test_where_nobody_can_tell_whether_there_is_a_host_the_job_waits(tmp_path: Path, text: str | None) -> None:
    """The file may be on carrelctld's machine alone; and TOML has more ways than this Lua knows."""
    assert submitted(tmp_path, text) == ["true", "guests", WAITS]


def test_a_host_that_is_set_later_is_there_for_the_next_job(tmp_path: Path) -> None:
    later = '[guest_nodes]\nhosts = "h1"\npartition = "vms"\n'
    assert submitted(tmp_path, "[guest_nodes]\n", LATER=later)[:2] == ["true", "vms"]


def test_a_site_without_hosts_may_have_a_partition_of_that_name_for_itself(tmp_path: Path) -> None:
    assert submitted(tmp_path, "[bank]\n", per="job", PARTITION="guests") == ["true", "guests", ""]


@pytest.mark.parametrize("kind", ["there", "absent", "a directory"])
def test_the_lua_knocks_where_the_settings_say_and_a_job_is_taken_whatever_is_there(tmp_path: Path, kind: str) -> None:
    knock = tmp_path / "knock"
    if kind == "there":
        knock.touch()
        os.utime(knock, (1, 1))
    elif kind == "a directory":
        knock.mkdir()
    text = f'[guest_nodes]\nhosts = "h1"\nknock = "{knock}"\n'
    assert submitted(tmp_path, text)[0] == "true"
    if kind == "there":
        assert (knock.stat().st_mtime, knock.stat().st_size) == (1, 0), "it is read, and never written"
    else:
        assert knock.exists() is (kind == "a directory")


def test_the_comment_says_for_what_a_job_waits_unless_its_owner_wrote_one(tmp_path: Path) -> None:
    text = '[guest_nodes]\nhosts = "h1"\n'
    assert submitted(tmp_path, text, PRIORITY="0")[2] == "carrel: waits for its owner to release it"
    assert submitted(tmp_path, text, COMMENT="mine")[2] == "mine"
