"""``carrel serve``: run a daemon in the foreground. Whoever starts it (systemd, the sandbox) watches it."""

from typing import Annotated

from cyclopts import App, Parameter

from carrel.config import this_node

Node = Annotated[
    str,
    Parameter(
        env_var="CARREL_NODE",
        show_default=False,
        help="The node's name in Slurm; by default CARREL_NODE, else the host's short name.",
    ),
]

app = App(name="serve", help="The daemons.")


@app.command
def node(*, node: Node = "") -> None:
    """Run carreld, the daemon of one node: makes and unmakes its guests. Needs root."""
    # Each daemon is imported only where it runs: the controller's libraries are absent on a node.
    from carrel.daemons.node import main  # noqa: PLC0415

    main(node or this_node())


@app.command
def sinks(*, node: Node = "") -> None:
    """Bring the samples of a node's jobs to the sinks of metrics.sinks, as carreld has it done."""
    from carrel.daemons.sinks import main  # noqa: PLC0415

    main(node or this_node())


@app.command
def controller() -> None:
    """Run carrelctld, the cluster's daemon: collects what the nodes report, for the CLI and REST."""
    from carrel.daemons.controller import main  # noqa: PLC0415

    main()
