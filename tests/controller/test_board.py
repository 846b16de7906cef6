"""The controller's memory: the last word of each node, bounded, and shown to whom it belongs."""

import msgspec

from carrel.daemons import board
from carrel.daemons.board import Board
from carrel.model.guest import Counters
from carrel.model.report import Event
from carrel.testing.daemons import a_guest, a_report

GUEST = a_guest().name


def an_event(text: str = "guest is ready", job_id: int = 7, time_s: float = 1.0, uid: int = 1001) -> Event:
    return Event(time_s=time_s, node="c1", what="guest-ready", text=text, job_id=job_id, uid=uid)


def test_a_report_replaces_the_nodes_last_one() -> None:
    known = Board()
    known.take(a_report(a_guest(), sent_s=1), now_s=10)
    known.take(a_report(sent_s=2), now_s=11)
    assert known.guests() == []


def test_what_guests_use_is_as_last_reported_and_alone_changes_no_guest() -> None:
    known = Board()
    used = Counters(memory_pss_bytes=40, memory_shared_bytes=30)
    known.take(a_report(a_guest(), sent_s=1), now_s=10)
    assert not known.take(msgspec.structs.replace(a_report(a_guest(), sent_s=2), counters={GUEST: used}), now_s=11)
    known.take(a_report(a_guest("c2"), node="c2"), now_s=11)
    assert [each.counters for each in known.known()] == [used, None]


def test_a_late_report_does_not_bring_back_what_is_gone() -> None:
    known = Board()
    known.take(a_report(sent_s=2), now_s=10)
    known.take(a_report(a_guest(), sent_s=1), now_s=11)
    assert known.guests() == []


def test_a_node_whose_clock_was_set_back_is_heard_at_once() -> None:
    known = Board()
    known.take(a_report(sent_s=7200), now_s=10)
    assert known.take(a_report(a_guest(), sent_s=3600), now_s=11)
    assert [guest.node for guest in known.guests()] == ["c1"]
    assert known.nodes["c1"].at_s == 11


def test_the_events_of_a_late_report_still_count() -> None:
    known = Board()
    known.take(a_report(sent_s=2), now_s=10)
    known.take(a_report(sent_s=1, events=(an_event(),)), now_s=11)
    assert known.events(7) == [an_event()]


def test_a_report_that_comes_twice_tells_its_events_once() -> None:
    known = Board()
    for _ in range(2):
        known.take(a_report(events=(an_event(),)), now_s=10)
    assert known.events(7) == [an_event()]


def test_guests_of_one_name_on_two_nodes_are_two() -> None:
    known = Board()
    known.take(a_report(a_guest("c1"), node="c1"), now_s=10)
    known.take(a_report(a_guest("c2"), node="c2"), now_s=10)
    assert [guest.node for guest in known.guests()] == ["c1", "c2"]


def test_a_guest_on_a_host_without_a_carreld_is_the_node_that_slurm_knows() -> None:
    known = Board()
    far = a_guest("esx-1", per="node", host_name="v1", driver="vsphere")
    assert known.see("vsphere", (far,))
    assert not known.see("vsphere", (far,))
    assert [(each.guest.node, each.host) for each in known.known(uid=1001, job_id=7)] == [("v1", "esx-1")]
    assert known.guests(uid=1002) == []
    assert known.see("vsphere", ())
    assert known.guests() == []


def test_the_host_of_a_guest_that_is_a_node_is_the_one_that_reported_it() -> None:
    known = Board()
    known.take(a_report(a_guest("v1", per="node"), a_guest("h1"), node="h1"), now_s=10)
    assert [(each.guest.node, each.host) for each in known.known()] == [("v1", "h1"), ("h1", "")]


def test_a_user_sees_his_own_guests_only() -> None:
    known = Board()
    known.take(a_report(a_guest(), a_guest(name="8.1.0", uid=1002)), now_s=10)
    assert [guest.uid for guest in known.guests(uid=1002)] == [1002]


def test_a_guest_that_nobody_remembers_is_for_administrators() -> None:
    known = Board()
    known.take(a_report(a_guest(run=None, uid=-1)), now_s=10)
    assert known.guests(uid=-1) == []
    assert len(known.guests()) == 1


def test_a_job_id_that_comes_back_does_not_show_the_last_owners_events() -> None:
    known = Board()
    known.take(a_report(events=(an_event("old", uid=1001), an_event("new", uid=1002))), now_s=10)
    assert [event.text for event in known.events(7, uid=1002)] == ["new"]


def test_events_come_in_the_order_of_their_time() -> None:
    known = Board()
    known.take(a_report(events=(an_event("b", time_s=2), an_event("a", time_s=1))), now_s=10)
    assert [event.text for event in known.events(7)] == ["a", "b"]


def test_a_job_that_talks_without_end_keeps_its_last_events() -> None:
    known = Board()
    events = tuple(an_event(str(at), time_s=at) for at in range(board.EVENTS_PER_JOB_MAX + 5))
    known.take(a_report(events=events), now_s=10)
    kept = known.events(7)
    assert (len(kept), kept[-1].text) == (board.EVENTS_PER_JOB_MAX, str(board.EVENTS_PER_JOB_MAX + 4))


def test_the_jobs_that_were_quiet_longest_are_forgotten_first() -> None:
    known = Board()
    for job_id in range(1, board.JOBS_MAX + 2):
        known.take(a_report(events=(an_event(job_id=job_id),)), now_s=10)
    assert known.events(1) == []
    assert len(known.events(board.JOBS_MAX + 1)) == 1


def test_a_console_outlives_its_guest_and_stays_its_owners() -> None:
    known = Board()
    guest = a_guest(state="down")
    down = Event(time_s=2, node="c1", what="guest-down", text="panic", job_id=7, guest=guest.name, uid=1001)
    report = msgspec.structs.replace(a_report(guest, events=(down,)), consoles={guest.name: "kernel panic"})
    known.take(report, now_s=10)
    known.take(a_report(sent_s=2), now_s=11)
    assert known.consoles(guest.name, uid=1001) == [("c1", "kernel panic")]
    assert known.consoles(guest.name, uid=1002) == []


def test_of_a_long_console_the_end_is_kept() -> None:
    known = Board()
    text = "x" * board.CONSOLE_BYTES_MAX + "panic"
    known.take(msgspec.structs.replace(a_report(), consoles={"g": text}), now_s=10)
    ((_, kept),) = known.consoles("g")
    assert len(kept) == board.CONSOLE_BYTES_MAX
    assert kept.endswith("panic")


def test_an_event_whose_owner_was_not_told_belongs_to_the_guests_user() -> None:
    known = Board()
    known.take(a_report(a_guest(), events=(an_event(uid=-1),)), now_s=10)
    assert [event.uid for event in known.events(7, uid=1001)] == [1001]


def test_an_event_of_a_job_that_nobody_knows_is_for_administrators() -> None:
    known = Board()
    known.take(a_report(events=(an_event(uid=-1),)), now_s=10)
    assert known.events(7, uid=1001) == []
    assert len(known.events(7)) == 1
