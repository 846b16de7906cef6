"""Slots of guests per task: distinct on a node, also among guests that are only about to be made."""

import asyncio
from typing import Any

from carrel.daemons.door import Door
from carrel.daemons.peers import Peers
from carrel.testing.daemons import a_guest


def a_door() -> Door:
    async def made_in_a_loop() -> Door:
        node: Any = None
        return Door(node, Peers(100))

    return asyncio.run(made_in_a_loop())


def test_tasks_that_come_at_once_are_promised_distinct_slots() -> None:
    door = a_door()
    assert [door._promise(f"7.1.0.0.{task}", []) for task in range(4)] == [0, 1, 2, 3]


def test_a_task_that_asks_again_keeps_its_slot() -> None:
    door = a_door()
    first = door._promise("7.1.0.0.0", [])
    door._promise("7.1.0.0.1", [])
    assert door._promise("7.1.0.0.0", []) == first


def test_a_promised_slot_is_free_again_with_its_guest() -> None:
    door = a_door()
    door._promise("7.1.0.0.0", [])
    door._promise("7.1.0.0.1", [a_guest(name="7.1.0.0.0", slot=0)])
    assert door._promise("8.1.0.0.0", [a_guest(name="7.1.0.0.1", slot=1)]) == 0
