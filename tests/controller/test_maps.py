"""Slot maps: VINO-Slurm's files, from what is running."""

import platform
import xml.etree.ElementTree as ET
from pathlib import Path

from carrel.daemons import maps
from carrel.daemons.maps import MapDirectory
from carrel.model.guest import Guest
from carrel.testing.daemons import a_guest

ADDRESSES = {"c1": "10.0.0.1", "c2": "10.0.0.2"}


def a_task(step: str, task: int, *, node: str = "c1", slot: int = 0, started_s: float = 1.0) -> Guest:
    name = f"7.1795220388.0.{step}.{task}"
    return a_guest(node, name=name, per="task", step=step, task=task, slot=slot, started_s=started_s)


def items(text: str) -> list[dict[str, str]]:
    return [item.attrib for item in ET.fromstring(text).findall("./VM/item")]  # noqa: S314  # our own text


def test_an_item_has_vinos_attributes() -> None:
    (item,) = items(maps.xml(maps.slots([a_task("0", 0, slot=3)], ADDRESSES)))
    assert item == {"id": "3", "hm": "10.0.0.1", "mem_mb": "512", "cores": "2", "arch": platform.machine()}


def test_there_is_one_item_per_task_in_the_order_of_tasks() -> None:
    guests = [a_task("0", 2, node="c2"), a_task("0", 0), a_task("0", 1, slot=1)]
    found = maps.slots(guests, ADDRESSES)
    assert [(slot.task, slot.hm, slot.id) for slot in found] == [
        (0, "10.0.0.1", 0),
        (1, "10.0.0.1", 1),
        (2, "10.0.0.2", 0),
    ]


def test_a_node_without_a_known_address_is_named() -> None:
    (slot,) = maps.slots([a_task("0", 0)], {})
    assert slot.hm == "c1"


def test_the_jobs_file_is_its_latest_step_and_each_step_has_its_own() -> None:
    wanted = maps.files([a_task("0", 0, started_s=1), a_task("1", 0, slot=1, started_s=2)], ADDRESSES)
    assert sorted(wanted) == ["vm_map7.0.conf", "vm_map7.1.conf", "vm_map7.conf"]
    assert wanted["vm_map7.conf"] == wanted["vm_map7.1.conf"] != wanted["vm_map7.0.conf"]


def test_a_guest_for_the_whole_job_is_in_the_jobs_file() -> None:
    assert list(maps.files([a_guest()], ADDRESSES)) == ["vm_map7.conf"]


def test_a_guest_that_is_down_is_in_no_map() -> None:
    assert maps.files([a_guest(state="down")], ADDRESSES) == {}


def test_a_step_with_a_strange_name_writes_no_file_of_that_name() -> None:
    assert list(maps.files([a_task("../../etc/x", 0)], ADDRESSES)) == ["vm_map7.conf"]


def test_a_map_is_readable_by_all_and_goes_with_the_guests(tmp_path: Path) -> None:
    directory = MapDirectory(tmp_path / "maps")
    directory.put({"vm_map7.conf": "<VM_LIST></VM_LIST>"})
    path = tmp_path / "maps" / "vm_map7.conf"
    assert path.stat().st_mode & 0o777 == 0o644
    directory.put({})
    assert list(path.parent.iterdir()) == []


def test_what_an_earlier_controller_left_is_swept_but_nothing_else(tmp_path: Path) -> None:
    for name in ("vm_map1.conf", "vm_map1.0.conf", ".vm_map2.conf.x", "vm_map.txt", "notes"):
        (tmp_path / name).write_text("")
    directory = MapDirectory(tmp_path)
    directory.put({"vm_map3.conf": "x"})
    directory.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "vm_map.txt", "vm_map3.conf"]


def test_a_directory_that_does_not_exist_has_nothing_to_sweep(tmp_path: Path) -> None:
    MapDirectory(tmp_path / "none").sweep()
    assert not (tmp_path / "none").exists()
