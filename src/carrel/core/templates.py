"""The template file: sections that inherit from each other, and named guests with ranges of names and addresses.

::

    [base]                                   a section: what guests made from it have
    template = "debian12-node"

    [small]
    inherit = ["base"]                       from left to right, then its own keys: the last one wins
    cpus = 2

    [guests."vm{1:16}"]                      sixteen guests of fixed names
    inherit = ["small"]
    host = "esx-{{1:4}}"                     the first four on esx-1, the next on esx-2 …
    address = "10.0.0.{11:26}"               one for each

It says what Multiverse's ``cluster_config`` could say; ``docs/reference/template-file.md`` has the keys side by side.
"""

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from carrel.config import what_is_wrong
from carrel.errors import CarrelError, NotFoundError
from carrel.model.template import GuestTemplate

GUESTS = "guests"
INHERIT = "inherit"
RANGED = ("host", "datastore", "address", "host_name")
"""Keys whose value may be a range; a name of a guest may too."""
COUNT_MAX = 65536
"""Of one range: more is a slip of the finger, and would be made all the same."""

_KEYS = tuple(field.name for field in msgspec.structs.fields(GuestTemplate))
_RANGE = re.compile(r"\{\{(\d+):(\d+)\}\}|\{(\d+):(\d+)\}")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DEVICE = re.compile(r"[0-9a-fA-F]{4}:[0-9a-fA-F]{4}")
_ONE_EACH = ("address", "host_name")

_ELSEWHERE = {
    "cpu": "write cpus",
    "memory": "write memory_mib",
    "linked": 'write clone = "linked"',
    "instant": 'write clone = "instant"',
    "vm_folder": "write folder",
    "is_dhcp": "write dhcp = true",
    "ip": "write address",
    "guest_hostname": "write host_name",
    "device": "write devices",
    "pf": "vCenter picks the physical function behind sriov_port_group",
    "script": "write user_data; the guest's cloud-init runs it",
    "sequence": "one script runs its parts in order; write user_data",
    "barrier": "no task starts before all guests of its job have joined",
    "guest_username": "nobody logs in to a guest to set it up; see customise and user_data",
    "guest_password": "nobody logs in to a guest to set it up; see customise and user_data",
    "power": "a guest of a job is always switched on",
}
"""Keys of ``cluster_config`` that have another name here, or none."""


class NamedGuest(msgspec.Struct, frozen=True, kw_only=True):
    """One guest of the table ``guests``: its name, and how it is made."""

    name: str
    template: GuestTemplate


class TemplateFile(msgspec.Struct, frozen=True, kw_only=True):
    """A template file, resolved: nothing is inherited any more, and ``guests`` has no ranges."""

    where: str
    sections: Mapping[str, GuestTemplate]
    guests: tuple[NamedGuest, ...]

    def section(self, name: str) -> GuestTemplate:
        """Return a section; its ranges stand, see ``for_guest``.

        Raises:
            NotFoundError: there is none of this name; the sentence names the known ones.
        """
        if name not in self.sections:
            known = ", ".join(sorted(self.sections)) or "none"
            raise NotFoundError(
                f"no guest template {name!r} in {self.where}{_near(name, self.sections)}; known: {known}"
            )
        return self.sections[name]


def parse(text: str, *, where: str) -> TemplateFile:
    """Read a template file.

    Args:
        text: Its content.
        where: Its path, for sentences.

    Raises:
        CarrelError: it is not TOML, has an unknown key, a wrong type, a circle, or a range that does not fit.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CarrelError(f"{where}: not TOML: {error}") from error
    tables = {name: _table(value, where=where, name=name) for name, value in raw.items() if name != GUESTS}
    sections = {name: _template(tables, tables[name], where=where, name=name) for name in tables}
    named: list[NamedGuest] = []
    for pattern, value in _table(raw.get(GUESTS, {}), where=where, name=GUESTS).items():
        name = f'{GUESTS}."{pattern}"'
        template = _template(tables, _table(value, where=where, name=name), where=where, name=name)
        named += _guests(pattern, template, where=where)
    _refuse_twice(named, where=where)
    return TemplateFile(where=where, sections=sections, guests=tuple(named))


def expand(text: str) -> tuple[str, ...]:
    """Return each value of a range, or the text itself where it has none.

    >>> expand("esx-{09:11}")
    ('esx-09', 'esx-10', 'esx-11')

    Raises:
        ValueError: the range ends before it begins, is too large, or there are two.
    """
    found = list(_RANGE.finditer(text))
    if not found:
        return (text,)
    if len(found) > 1:
        raise ValueError(f"{text!r} has {len(found)} ranges, and may have one")
    first, last = [group for group in found[0].groups() if group is not None]
    if not 0 <= int(last) - int(first) < COUNT_MAX:
        raise ValueError(f"{text!r}: a range goes up, by at most {COUNT_MAX} values")
    before, after = text[: found[0].start()], text[found[0].end() :]
    return tuple(f"{before}{number:0{len(first)}}{after}" for number in range(int(first), int(last) + 1))


def nth(text: str, index: int, count: int) -> str:
    """Return what the guest ``index`` of ``count`` gets: in turn for ``{x:y}``, in blocks for ``{{x:y}}``.

    >>> [nth("esx-{1:2}", index, 4) for index in range(4)]
    ['esx-1', 'esx-2', 'esx-1', 'esx-2']
    >>> [nth("esx-{{1:2}}", index, 4) for index in range(4)]
    ['esx-1', 'esx-1', 'esx-2', 'esx-2']
    """
    values = expand(text)
    return values[index * len(values) // count if "{{" in text else index % len(values)]


def for_guest(template: GuestTemplate, *, index: int = 0, count: int = 1, host: str = "") -> GuestTemplate:
    """Return the template of one guest: ranges and ``{host}`` put in.

    Args:
        template: A section.
        index: Which of the guests, from 0.
        count: How many there are.
        host: Where it was placed; empty: where the section says.
    """
    chosen = {key: nth(getattr(template, key), index, count) for key in RANGED}
    chosen["host"] = host or chosen["host"]
    made = msgspec.structs.replace(template, **chosen)
    return msgspec.structs.replace(made, template=made.template.replace("{host}", made.host))


def _guests(pattern: str, template: GuestTemplate, *, where: str) -> list[NamedGuest]:
    name = f'{where}: {GUESTS}."{pattern}"'
    try:
        names = expand(pattern)
    except ValueError as error:
        raise CarrelError(f"{name}: {error}") from error
    for key in _ONE_EACH:
        many = len(expand(getattr(template, key)))
        if getattr(template, key) and many < len(names):
            raise CarrelError(f"{name}: {key} has {many} values for {len(names)} guests, and each needs its own")
    if wrong := next((one for one in names if not _NAME.fullmatch(one)), ""):
        raise CarrelError(f"{name}: {wrong!r} is no host name; use a-z, 0-9 and -, at most 63 of them")
    refuse_incomplete(template, where=name)
    return [
        NamedGuest(name=one, template=for_guest(template, index=index, count=len(names)))
        for index, one in enumerate(names)
    ]


def _refuse_twice(named: Sequence[NamedGuest], *, where: str) -> None:
    """One name, or one address, cannot be two guests'."""
    for what, values in (
        ("guest", [one.name for one in named]),
        ("address", [one.template.address for one in named if one.template.address]),
    ):
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise CarrelError(f"{where}: {what} {twice} is there twice; two guests cannot share it")


def _template(tables: Mapping[str, Any], own: Mapping[str, Any], *, where: str, name: str) -> GuestTemplate:
    raw = _inherited(tables, own, where=where, path=(name,))
    _refuse_ranges(raw, where=where, name=name)
    try:
        template = msgspec.convert(raw, GuestTemplate)
    except msgspec.ValidationError as error:
        raise CarrelError(f"{where}: {name}: {what_is_wrong(error, GuestTemplate)}") from error
    _check_network(template, where=f"{where}: {name}")
    for device in template.devices:
        if not _DEVICE.fullmatch(device):
            raise CarrelError(f"{where}: {name}.devices: {device!r} is no vendor and device id, as in 10de:20b5")
    return template


def _inherited(
    tables: Mapping[str, Any], own: Mapping[str, Any], *, where: str, path: tuple[str, ...]
) -> dict[str, Any]:
    _refuse_unknown(own, where=where, name=path[-1])
    merged: dict[str, Any] = {}
    parents = own.get(INHERIT, [])
    if not isinstance(parents, list):
        raise CarrelError(f'{where}: {path[-1]}.{INHERIT} must be a list of sections, as in {INHERIT} = ["base"]')
    for parent in parents:
        if parent in path:
            raise CarrelError(f"{where}: {' inherits from '.join([*path, str(parent)])}; break the circle")
        if parent not in tables:
            raise CarrelError(f"{where}: {path[-1]}.{INHERIT}: no section {parent!r}{_near(str(parent), tables)}")
        merged |= _inherited(tables, tables[parent], where=where, path=(*path, parent))
    return merged | {key: value for key, value in own.items() if key != INHERIT}


def _refuse_unknown(table: Mapping[str, Any], *, where: str, name: str) -> None:
    for key in table:
        if key in _KEYS or key == INHERIT:
            continue
        hint = f" ({_ELSEWHERE[key]})" if key in _ELSEWHERE else _near(key, _KEYS)
        raise CarrelError(f"{where}: unknown key {name}.{key}{hint}; see docs/reference/template-file.md")


def _refuse_ranges(raw: Mapping[str, Any], *, where: str, name: str) -> None:
    for key, value in raw.items():
        if not isinstance(value, str) or not _RANGE.search(value):
            continue
        if key not in RANGED:
            raise CarrelError(f"{where}: {name}.{key} = {value!r} holds a range; only {', '.join(RANGED)} may")
        try:
            expand(value)
        except ValueError as error:
            raise CarrelError(f"{where}: {name}.{key}: {error}") from error


def _check_network(template: GuestTemplate, *, where: str) -> None:
    """Say before a guest is cloned what would keep it off the network."""
    for key, values in (
        ("address", expand(template.address) if template.address else ()),
        ("gateway", (template.gateway,) if template.gateway else ()),
        ("dns", template.dns),
    ):
        for value in values:
            try:
                ipaddress.ip_address(value)
            except ValueError as error:
                raise CarrelError(f"{where}: {key} = {value!r} is no address") from error
    if template.netmask:
        try:
            ipaddress.ip_network(f"0.0.0.0/{template.netmask}")
        except ValueError as error:
            raise CarrelError(f"{where}: netmask = {template.netmask!r} is no netmask; as in 255.255.255.0") from error


def refuse_incomplete(template: GuestTemplate, *, where: str) -> None:
    """Refuse a template that no guest can be made from; a section that others inherit from may be so.

    Raises:
        CarrelError: a key is missing, or two exclude each other.
    """
    if not template.template:
        raise CarrelError(f'{where}: no template; name the VM that is cloned: template = "debian12-node"')
    if template.address and template.dhcp:
        raise CarrelError(
            f"{where}: address = {template.address!r} and dhcp = true exclude each other; write dhcp = false"
        )
    if not template.dhcp and not template.netmask:
        raise CarrelError(f"{where}: dhcp = false and no netmask; write it, as in 255.255.255.0")


def _table(value: Any, *, where: str, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CarrelError(f"{where}: {name} must be a table: keys stand in a [section]")
    return value


def _near(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    near = difflib.get_close_matches(word, list(known))
    return f" (did you mean {near[0]}?)" if near else ""
