"""What a job asked for, from the real Lua to what is read of Slurm's text: whatever its owner calls it."""

import shutil
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
assert(dofile(os.getenv("LUA")).submit(job, "guests"))
io.write(job.admin_comment)
"""


@pytest.mark.skipif(shutil.which("lua5.1") is None, reason="no lua5.1")
def test_what_is_odd_in_a_request_goes_through_lua_and_slurms_text_unharmed() -> None:
    comment = process.run(["lua5.1", "-e", ASK], env={"ODD": ODD, "LUA": str(LUA)}).strip()
    assert not set(comment) & set(" '\";$\n")
    for mark in ("", "bank=5fe9.g;", "bank=5fe9.g;held;"):
        wish = parsed_wish(f"JobId=7 JobName=x UserId=ada(7) AdminComment={mark}{comment} Comment=y")
        assert wish is not None
        assert (wish.cwd, wish.request.mounts, wish.request.image) == (ODD, tuple(ODD.split("\n")), "debian12")
        assert not wish.request.root
