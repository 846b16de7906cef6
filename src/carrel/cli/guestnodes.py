"""Why jobs whose guests are Slurm nodes would wait in vain: what is set, runs, and what Slurm and the hosts' table say.

Each is right by itself and wrong beside another, so they are compared.
"""

import asyncio
from collections.abc import Collection, Iterator

from carrel.cli import api, output
from carrel.cli.check import Check, ok, problem
from carrel.config import Config
from carrel.daemons import views
from carrel.errors import CarrelError
from carrel.slurm import hostlist
from carrel.slurm.pool import SlurmPool

PAGE = "guests-as-nodes"
NAMED_MAX = 5
"""So many hosts a line names."""


def checks(
    settings: Config, slurm: dict[str, str] | CarrelError, health: views.Health | CarrelError
) -> Iterator[Check]:
    """Look at all of it; nothing is said where no hosts are set and Slurm has no nodes for guests."""
    if not isinstance(slurm, CarrelError):
        yield from partition(settings)
    if not wanted(settings):
        return
    if isinstance(health, CarrelError):
        what = "jobs with --guest-per=node wait for carrelctld, which does not answer"
        yield problem(what, "on its host: systemctl start carrelctld")
        return
    yield from controller(settings, health)
    yield from hosts(settings, health.guest_nodes.silent if health.guest_nodes else ())


def wanted(settings: Config) -> bool:
    """Tell whether the site has hosts for guests that are nodes."""
    return bool(settings.guest_nodes.hosts or settings.guest_nodes.remote)


def partition(settings: Config) -> Iterator[Check]:
    """Look at Slurm's partition of the guests."""
    name = settings.guest_nodes.partition
    lines = f"its lines for slurm.conf are in docs/how-to/{PAGE}.md"
    try:
        nodes = asyncio.run(SlurmPool(settings.slurm, name).names())
    except CarrelError as error:
        if wanted(settings):
            what = f"partition {name} (guest_nodes.partition), whose nodes are guests, cannot be seen: {error}"
            yield problem(what, lines)
        return
    cloud = [node.name for node in nodes.values() if "CLOUD" in node.state]
    if not wanted(settings):
        if cloud:
            yield problem(
                f"partition {name} has nodes for guests, and no host is set to carry them: --guest-per=node is refused",
                'hosts = "h[1-4]" in [guest_nodes] of carrel.toml, restart carrelctld, then: carrel host add h1',
            )
    elif not nodes:
        yield problem(f"partition {name} (guest_nodes.partition) has no nodes: no guest gets a name", lines)
    elif len(cloud) < len(nodes):
        others = [node for node in nodes if node not in cloud]
        yield problem(f"partition {name}: {_names(others)} not State=CLOUD, so no guest gets the name", lines)
    else:
        yield ok(f"partition {name} is there for guests that are nodes, with {len(nodes)} names")


def controller(settings: Config, health: views.Health) -> Iterator[Check]:
    """Compare what carrelctld was started with, and what hampers it."""
    name, runs = settings.guest_nodes.partition, health.guest_nodes
    if runs is None:
        what = "carrelctld runs with settings that name no hosts for guests that are nodes: such jobs wait"
        yield problem(
            what, f"restart carrelctld; does it read {settings.source or 'this carrel.toml'} on its own host?"
        )
    elif runs.partition != name:
        what = f"carrelctld looks at partition {runs.partition}, and guest_nodes.partition is {name}: such jobs wait"
        yield problem(what, "restart carrelctld")
    elif runs.trouble:
        what = f"carrelctld does nothing for guests that are nodes: {output.printable(runs.trouble)}"
        yield problem(what, "its log, on its host: journalctl -u carrelctld")
    else:
        yield ok("carrelctld looks after guests that are nodes")


def hosts(settings: Config, silent: Collection[str]) -> Iterator[Check]:
    """Compare the table of hosts with the settings, and with who asks what to carry."""
    try:
        table = {host.name: host for host in api.hosts(settings)}
    except CarrelError as error:
        yield problem(f"the table of hosts: {error}", "carrel host list")
        return
    named = (settings.guest_nodes.hosts, *settings.guest_nodes.remote.values())
    known = list(dict.fromkeys(name for text in named for name in hostlist.expand(text)))
    if missing := [name for name in known if name not in table]:
        yield problem(f"no guest goes to {_names(missing)}: not in the table of hosts", f"carrel host add {missing[0]}")
    if strange := [name for name in table if name not in known]:
        what = f"no guest goes to {_names(strange)}: in the table of hosts, and not named in [guest_nodes]"
        yield problem(what, f"name it there and restart carrelctld, or: carrel host remove {strange[0]}")
    for host in table.values():
        if host.state == "down" and host.name in known:
            what = f"no guest goes to host {host.name}: {output.printable(host.reason)}"
            yield problem(what, f"on it: systemctl status carreld, carrel node check {host.name}")
    mute = [host.name for host in table.values() if host.state == "up" and host.name in silent]
    if mute:
        what = f"no guest goes to {_names(mute)}: not heard to ask what to carry"
        then = f"is {mute[0]} in guest_nodes.hosts of its own carrel.toml? then, on it: systemctl restart carreld"
        yield problem(what, then)
    up = sum(host.state == "up" and host.name in known and host.name not in silent for host in table.values())
    if up:
        yield ok(f"{up} of {len(known)} hosts take guests that are nodes")
    elif table and all(host.state == "drained" for host in table.values()):
        yield problem("no host takes guests: each is drained", "carrel host undrain HOST")


def why_not(settings: Config) -> str:
    """Return why nobody makes the guest of a job that waits for one, as a sentence; or an empty string."""
    if not wanted(settings):
        return ""  # a partition of that name may be anybody's
    try:
        runs = api.health(settings).guest_nodes
    except CarrelError as error:
        return f"waits for carrelctld to make its guest: {error}"
    if runs is None:
        return "carrelctld has no hosts for guests that are nodes; ask an administrator (see: carrel node check)"
    return f"carrelctld does nothing for it: {runs.trouble}" if runs.trouble else ""


def _names(names: list[str]) -> str:
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return ", ".join(names[:NAMED_MAX]) + more
