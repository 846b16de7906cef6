"""What carreld tells about its node: to root everything, to a user what is his."""

import msgspec

from carrel.daemons.door import _shown
from carrel.model.report import Event, NodeReport
from carrel.testing.daemons import a_guest, a_report

EVENTS = tuple(Event(time_s=1.0, node="c1", what="x", text=str(uid), uid=uid) for uid in (-1, 1001, 1002))


def a_shared_node() -> NodeReport:
    guests = (a_guest(name="7.1.0", uid=1001), a_guest(name="8.1.0", uid=1002))
    return msgspec.structs.replace(a_report(*guests), consoles={"7.1.0": "mine", "8.1.0": "not mine", "gone": "?"})


def test_a_user_is_shown_his_own_guests_events_and_consoles() -> None:
    shown = _shown(a_shared_node(), EVENTS, 1001)
    assert [guest.name for guest in shown.guests] == ["7.1.0"]
    assert [event.text for event in shown.events] == ["1001"]
    assert shown.consoles == {"7.1.0": "mine"}


def test_root_is_shown_everything() -> None:
    shown = _shown(a_shared_node(), EVENTS, 0)
    assert (len(shown.guests), len(shown.events)) == (2, 3)
    assert "8.1.0" in shown.consoles
