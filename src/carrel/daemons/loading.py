"""Loads a guest driver by its name: ours take the same road as a stranger's."""

from importlib.metadata import entry_points

from carrel.errors import NodeFaultError
from carrel.ports import Driver, DriverContext, LoadedDriver


def load_driver(name: str, context: DriverContext) -> Driver:
    """Return the driver of this name. May take a second, for what it imports.

    Raises:
        NodeFaultError: none of this name is installed, it does not load, or its settings are not whole.
    """
    points = entry_points(group="carrel.drivers")
    if name not in points.names:
        known = ", ".join(sorted(points.names))
        raise NodeFaultError(f"node {context.node} has no guest driver '{name}'; known: {known}")
    try:
        loaded: type[LoadedDriver] = points[name].load()
        return loaded.from_context(context)  # type: ignore[return-value]  # both protocols
    except (ImportError, AttributeError) as error:
        raise NodeFaultError(f"node {context.node}: guest driver '{name}' does not load: {error}") from error
