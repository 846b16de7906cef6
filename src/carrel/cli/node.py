"""``carrel node``: nodes, and why one cannot run guests."""

from collections.abc import Iterator, Sequence
from typing import Annotated

from cyclopts import App, Parameter

from carrel import config
from carrel.cli import api, output, report
from carrel.cli.guest import Json
from carrel.daemons import views
from carrel.errors import NotFoundError
from carrel.model.sample import SamplerStatus
from carrel.model.shipping import SinkStatus

Node = Annotated[str, Parameter(show_default=False, help="The node's name in Slurm.")]

app = App(name="node", help="Nodes, and why one cannot run guests.")


@app.command(name="list")
def list_(*, json: Json = False) -> None:
    """List the nodes whose carreld has reported."""
    found = api.nodes(config.load())
    if json:
        output.objects(found)
        return
    titles = ("NODE", "STATE", "GUESTS", "ACCEL", "VERSION", "HEARD", "WHY")
    rows = [
        (n.node, n.state, n.guests, n.accelerator, n.version, output.ago(n.heard), "; ".join(n.faults)) for n in found
    ]
    output.table(titles, rows)


@app.command
def show(node: Node, /, *, json: Json = False) -> None:
    """Show a node as its carreld last described it, with its guests."""
    settings = config.load()
    one = _find(api.nodes(settings), node)
    if json:
        output.objects([one])
        return
    accelerator = f"{one.accelerator} ({one.accelerator_why})" if one.accelerator_why else one.accelerator
    output.fields(
        [
            ("node", one.node),
            ("state", one.state),
            ("accelerator", accelerator),
            ("carreld", f"{one.version}, since {output.clock(one.started)}"),
            ("last report", f"{output.clock(one.heard)}, {output.ago(one.heard)} ago"),
            *(("fault", fault) for fault in one.faults),
            *_sampling(one.sampler),
            *_sinks(one.sinks),
        ]
    )
    guests = [guest for guest in api.guests(settings) if guest.node == node] if one.guests else []
    if guests:
        print()
        output.table(("GUEST", "STATE", "JOB", "USER"), [(g.name, g.state, g.job_id, g.user) for g in guests])


@app.command
def check(node: Node = "", /, *, json: Json = False) -> int:
    """Look for what keeps a node of this machine from running guests; exit 1 when there is anything."""
    # The doctor looks at everything; the other verbs start without what it needs.
    from carrel.cli import doctor  # noqa: PLC0415

    settings = config.load()
    found = doctor.examine(settings, [node] if node else api.nodes_here(settings))
    if json:
        output.objects(found)
    else:
        for one in found:
            print(f"{'ok' if one.ok else 'problem':<8} {output.printable(one.what)}")
            if one.next:
                print(f"{'':<8} next: {output.printable(one.next)}")
    return 0 if all(one.ok for one in found) else 1


def _sampling(sampler: SamplerStatus | None) -> Iterator[tuple[str, str]]:
    if sampler is None:
        yield "sampling", "off (metrics.enabled)"
        return
    cost_us = sum(sampler.cost_us.values())
    yield "sampling", f"{sampler.jobs} jobs, {cost_us:.0f} us of CPU time a sample" if sampler.jobs else "no job now"
    if sampler.fault:
        yield "sampling fault", output.printable(sampler.fault)
    if sampler.failures:
        yield "failed", ", ".join(f"{what} {count}x" for what, count in sorted(sampler.failures.items()))
        yield "last failure", output.printable(sampler.last_failure)


def _sinks(sinks: Sequence[SinkStatus]) -> Iterator[tuple[str, str]]:
    for sink in sinks:
        waiting = f", {report.size(sink.waiting_bytes)} wait" if sink.waiting_bytes else ""
        yield f"sink {sink.name}", f"{sink.rows_written} rows taken{waiting}"
        if sink.dropped or sink.series_lost:
            why = ", ".join(f"{count} ({what})" for what, count in sorted(sink.rows_dropped.items()))
            lost = f"{sink.series_lost} series were removed by their owners" if sink.series_lost else ""
            yield "dropped", "; ".join(part for part in (f"{why} rows" if why else "", lost) if part)
        if sink.error:
            yield "failing", output.printable(sink.error)


def _find(found: list[views.NodeView], name: str) -> views.NodeView:
    for one in found:
        if one.node == name:
            return one
    known = ", ".join(one.node for one in found) or "none"
    raise NotFoundError(f"node {name!r} has not reported; known: {known}; on that node: carrel node check")
