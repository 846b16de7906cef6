"""A carreld that starts where another one was."""

from pathlib import Path

from carrel.config import Config
from carrel.config import Guests as GuestSettings
from carrel.config import Node as NodeSettings
from carrel.daemons.node import Node


def a_node(where: Path) -> Node:
    return Node(Config(node=NodeSettings(dir=str(where)), guests=GuestSettings(driver="other")), "c1")


def test_guests_of_a_driver_that_only_a_user_asked_for_are_looked_after_by_the_next_carreld(tmp_path: Path) -> None:
    (tmp_path / "guests-qemu").mkdir()
    node = a_node(tmp_path)
    node.adopt()
    assert list(node.drivers) == ["qemu"]


def test_guests_of_a_driver_that_is_gone_are_told_of_and_keep_no_carreld_from_starting(tmp_path: Path) -> None:
    (tmp_path / "guests-nonsense").mkdir()
    node = a_node(tmp_path)
    node.adopt()
    assert "guests-nonsense cannot be looked after: node c1 has no guest driver" in node.journal.all()[0].text
