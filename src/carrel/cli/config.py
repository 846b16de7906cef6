"""``carrel config``: the settings in force, and whether a file of them is right."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import App, Parameter

from carrel import config, paths
from carrel.cli import output
from carrel.cli.guest import Json
from carrel.core import addresses
from carrel.daemons import transport
from carrel.errors import CarrelError, NotFoundError
from carrel.slurm import hostlist

File = Annotated[Path | None, Parameter(help="The file; by default the one in force.")]

app = App(name="config", help="The settings in force.")


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One setting."""

    name: str
    value: object
    source: str
    """The file that says so, or ``default``."""


@app.command
def show(*, json: Json = False) -> None:
    """Show every setting, its value, and where it comes from."""
    settings = config.load()
    written = _written(settings)
    found = [
        Setting(name=name, value=value, source=settings.source if name in written else "default")
        for name, value in _flat(msgspec.to_builtins(settings))
        if name != "source"
    ]
    if json:
        output.objects(found)
        return
    output.table(("SETTING", "VALUE", "SOURCE"), [(s.name, _toml(s.value), s.source) for s in found])


@app.command
def check(file: File = None, /) -> None:
    """Check a configuration file: unknown keys, wrong types, values that cannot be."""
    path = file or paths.config_file()
    if path is None:
        raise NotFoundError("no configuration file, so all defaults apply; see: carrel config show")
    settings = config.load(path)
    transport.address(settings.controller.listen)
    _check_hosts(settings)
    print(f"{path}: ok")


def _check_hosts(settings: config.Config) -> None:
    """Refuse names of hosts, and addresses for guests, that are none."""
    pool = settings.placement.addresses
    if pool.static and pool.list:
        raise CarrelError(f"{settings.source}: placement.addresses has static and list; leave one of them out")
    try:
        addresses.expand(pool.static)
    except CarrelError as error:
        raise CarrelError(f"{settings.source}: placement.addresses.static: {error}") from error
    mine = settings.guest_nodes
    texts = {"hosts": mine.hosts} | {f"remote.{driver}": text for driver, text in mine.remote.items()}
    for key, text in texts.items():
        try:
            names = hostlist.expand(text)
        except ValueError:
            names = ("[",)
        if any("[" in name or "]" in name for name in names) or text.count("[") != text.count("]"):
            raise CarrelError(f"{settings.source}: guest_nodes.{key} = {text!r} is no list of names like h[1-40],g7")


def _written(settings: config.Config) -> set[str]:
    if not settings.source:
        return set()
    with Path(settings.source).open("rb") as file:
        return {name for name, _ in _flat(tomllib.load(file))}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _toml(value: object) -> str:
    return msgspec.json.encode(value).decode()
