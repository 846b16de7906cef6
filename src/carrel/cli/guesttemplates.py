"""``carrel guest templates``: whether a template file is right, and what its sections and guests come to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from carrel import config
from carrel.cli import output
from carrel.core import templates as core
from carrel.core.guestconf import ClusterFacts, NodeShape, slurm_conf
from carrel.drivers.vsphere.settings import Settings
from carrel.errors import CarrelError, NotFoundError
from carrel.model.template import GuestTemplate

File = Annotated[Path | None, Parameter(help="The template file; by default drivers.vsphere.template_file.")]
Section = Annotated[str, Parameter(show_default=False, help="Show every key of this section.")]
Json = Annotated[
    bool, Parameter(name="--json", negative="", show_default=False, help="Print JSON: one object per line.")
]


_A_CLUSTER = ClusterFacts(cluster="any", controller="any")
_A_NODE = NodeShape(name="any", cpus=1, memory_mib=1)
"""Every one has the same placeholders."""


class TemplateRow(msgspec.Struct, frozen=True, kw_only=True):
    """A section, or a named guest, with all that it inherits in place."""

    name: str
    kind: str
    """``section`` or ``guest``."""
    template: GuestTemplate


def templates(file: File = None, /, *, section: Section = "", as_json: Json = False) -> None:
    """Check a template file of guests that are nodes, and show what its sections and named guests come to.

    A section of the file is what --guest names with a driver whose guests are virtual machines of a hypervisor.
    """
    path = file or Path(config.driver_settings(config.load(), "vsphere", Settings).template_file)
    try:
        found = core.parse(path.read_text(), where=str(path))
    except UnicodeDecodeError as error:
        raise CarrelError(f"{path}: not TOML: {error}") from error
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror}; see docs/reference/template-file.md") from error
    rows = [TemplateRow(name=name, kind="section", template=one) for name, one in found.sections.items()]
    rows += [TemplateRow(name=one.name, kind="guest", template=one.template) for one in found.guests]
    for name, template in found.sections.items():
        _check_files(template, where=f"{path}: {name}")
    if section:
        found.section(section)
        rows = [row for row in rows if (row.name, row.kind) == (section, "section")]
    if as_json:
        output.objects(rows)
    elif section:
        output.fields([("section", section), *_written(rows[0].template)])
    else:
        _print(path, rows)


def _check_files(template: GuestTemplate, *, where: str) -> None:
    """Read what guests of it are given, as carrelctld does when it makes one: an error is better known now."""
    for key in ("slurm_conf", "user_data"):
        if not getattr(template, key):
            continue
        try:
            text = Path(getattr(template, key)).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CarrelError(f"{where}.{key}: {error}; is it there on this machine, and readable?") from error
        if key == "slurm_conf":
            try:
                slurm_conf(_A_CLUSTER, _A_NODE, template=text)
            except CarrelError as error:
                raise CarrelError(f"{where}.{key} = {template.slurm_conf!r}: {error}") from error


def _written(template: GuestTemplate) -> list[tuple[str, object]]:
    return [(field.name, _shown(getattr(template, field.name))) for field in msgspec.structs.fields(template)]


def _shown(value: object) -> object:
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else value


def _print(path: Path, rows: Sequence[TemplateRow]) -> None:
    titles = ("NAME", "KIND", "TEMPLATE", "CLONE", "CPUS", "MEMORY", "PLACE", "DATASTORE", "ADDRESS", "MAY HOLD KEY")
    output.table(titles, [_row(row) for row in rows])
    output.say(f"{path}: ok, {_counted(rows, 'section')} and {_counted(rows, 'guest')}")


def _row(row: TemplateRow) -> tuple[object, ...]:
    one = row.template
    memory = output.size(one.memory_mib * 2**20) if one.memory_mib else "as asked"
    return (
        *(row.name, row.kind, one.template or "-", one.clone, one.cpus or "as asked", memory),
        *(one.host or one.cluster or "-", one.datastore or "-"),
        "dhcp" if one.dhcp else one.address or "from the pool",
        "yes" if one.trusted else "no",
    )


def _counted(rows: Sequence[TemplateRow], kind: str) -> str:
    many = sum(row.kind == kind for row in rows)
    return f"{many} {kind}{'' if many == 1 else 's'}"
