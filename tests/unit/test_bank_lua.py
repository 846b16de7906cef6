"""The settings as ``bank.lua`` reads them, which has no TOML of its own."""

import shutil
from pathlib import Path

import pytest

from carrel import config, process

ASK = """
package.preload["socket.unix"] = function() return function()
  return { settimeout = function() end, close = function() end, connect = function(_, path) io.write(path) end }
end end
package.preload["socket"] = function() return { gettime = os.time } end
slurm = { SUCCESS = 0, log_user = function() end }
dofile(os.getenv("LUA")).submit({}, 1000)
"""


@pytest.mark.skipif(shutil.which("lua5.1") is None, reason="no lua5.1")
@pytest.mark.parametrize(
    "text",
    [
        '[bank]\nenabled = true\nsocket = "/run/a b/s#1.sock"  # ours\n',
        "[ bank ]\nenabled=true\nsocket='/run/a b/s#1.sock'\n[metrics]\nenabled = false\n",
    ],
)
def test_the_lua_reads_settings_as_toml_may_have_them(tmp_path: Path, text: str) -> None:
    """A bank that is enabled, and that the Lua takes for disabled, lets every job pass."""
    (tmp_path / "carrel.toml").write_text(text)
    assert config.load(tmp_path / "carrel.toml").bank.socket == "/run/a b/s#1.sock"
    lua = Path(__file__).parents[2] / "slurm" / "bank.lua"
    env = {"CARREL_CONFIG": str(tmp_path / "carrel.toml"), "LUA": str(lua)}
    assert process.run(["lua5.1", "-e", ASK], env=env) == "/run/a b/s#1.sock"


@pytest.mark.skipif(shutil.which("lua5.1") is None, reason="no lua5.1")
def test_a_site_without_the_bank_needs_no_socket_in_lua(tmp_path: Path) -> None:
    """``job_submit.lua`` loads it for guests that are nodes, too, and a script that fails refuses every job."""
    (tmp_path / "carrel.toml").write_text("[bank]\nenabled = false\n")
    lua = Path(__file__).parents[2] / "slurm" / "bank.lua"
    env = {"CARREL_CONFIG": str(tmp_path / "carrel.toml"), "LUA": str(lua)}
    script = """
    package.path, package.cpath, slurm = "", "", { SUCCESS = 0 }
    io.write(tostring(dofile(os.getenv("LUA")).submit({}, 1000)))
    """
    assert process.run(["lua5.1", "-e", script], env=env) == "0"
