"""The script that makes a cloned machine a Slurm node, with a hypervisor's tool and a slurmd that stand in."""

import os
import subprocess  # it waits, and is looked at meanwhile
from pathlib import Path

import pytest

from carrel.process import CommandError, run

SCRIPT = Path(__file__).parents[2] / "guest" / "carrel-join"
_WAIT_S = 60.0


class Machine:
    """What a guest has: a directory of its own, its hypervisor's words in files, and a slurmd that says its words."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.conf = where / "slurm.conf"
        self._said = where / "said"
        tools = where / "bin"
        tools.mkdir()
        _program(tools / "vmware-rpctool", f'cat "{where}/info/${{1#info-get guestinfo.carrel.}}"')
        _program(tools / "slurmd", f'for word; do echo "$word"; done >"{self._said}"')
        _program(tools / "hostname", f'if [ $# = 0 ]; then echo parent; else echo "$1" >"{where}/host"; fi')
        (where / "info").mkdir()
        self.env = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "CARREL_JOIN_STATE": str(where / "state"),
            "CARREL_JOIN_CONF": str(self.conf),
            "CARREL_JOIN_NETWORK": str(where / "network"),
            "CARREL_JOIN_PERIOD_S": "0.02",
        }

    def tell(self, **facts: str) -> None:
        for name, text in facts.items():
            # The node's name comes last, as it comes with all else in one request.
            (self.where / "info" / name).write_text(text)

    def join(self) -> list[str]:
        run([SCRIPT], env=self.env, timeout_s=_WAIT_S)
        return self._said.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_clone_becomes_the_node_that_it_is_told_to_be(machine: Machine) -> None:
    machine.tell(slurm_conf="ClusterName=physics\nNodeName=vm7 CPUs=2\n", host_name="vm7", node_name="vm7")
    assert machine.join() == ["-D", "-N", "vm7"]
    assert machine.conf.read_text() == "ClusterName=physics\nNodeName=vm7 CPUs=2\n"
    assert (machine.where / "host").read_text() == "vm7\n"


def test_a_node_that_registers_by_itself_gives_its_whole_description_as_one_word(machine: Machine) -> None:
    machine.tell(slurmd_conf="CPUs=2 Boards=1 Feature=a,b", node_name="vm7")
    assert machine.join() == ["-D", "-N", "vm7", "-Z", "--conf", "CPUs=2 Boards=1 Feature=a,b"]


def test_without_a_file_of_its_own_the_machines_stays(machine: Machine) -> None:
    machine.conf.write_text("ClusterName=of the image\n")
    machine.tell(node_name="vm7")
    machine.join()
    assert machine.conf.read_text() == "ClusterName=of the image\n"


def test_the_parent_of_instant_clones_waits_and_each_clone_goes_on(machine: Machine) -> None:
    with subprocess.Popen([SCRIPT], env={**os.environ, **machine.env}) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.3)
        machine.tell(node_name="vm7")
        assert waiting.wait(_WAIT_S) == 0
    assert machine.join() == ["-D", "-N", "vm7"]


def test_the_sites_own_way_to_an_address_is_told_all_of_it(machine: Machine) -> None:
    shown = machine.where / "shown"
    _program(machine.where / "network", f'echo "$DHCP|$ADDRESS|$NETMASK|$GATEWAY|$DNS|$DOMAIN" >"{shown}"')
    facts = {
        "dhcp": "no",
        "address": "10.0.0.9",
        "netmask": "255.0.0.0",
        "gateway": "10.0.0.1",
        "dns": "10.0.0.2 10.0.0.3",
    }
    machine.tell(**facts, node_name="vm7")
    machine.join()
    assert shown.read_text() == "no|10.0.0.9|255.0.0.0|10.0.0.1|10.0.0.2 10.0.0.3|\n"


@pytest.mark.parametrize("name", ["vm7; touch /tmp/x", "vm 7", "vm7\nvm8", "$(id)"])
def test_a_name_that_is_none_is_refused(machine: Machine, name: str) -> None:
    machine.tell(node_name=name)
    with pytest.raises(CommandError, match="is no name"):
        machine.join()


def _program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
