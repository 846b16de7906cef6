"""Slurm's short form of node names, ``c[1-3,07],login``, written out.

``scontrol show hostnames`` does the same with a process per call; a list of all jobs needs one per job.
"""

import itertools
import re

_NODES_MAX = 65536
"""As many as Slurm takes in one expression; a typing error must not fill the memory."""

_PART = re.compile(r"\[([^\]]*)\]|([^\[\]]+)")


def expand(text: str) -> tuple[str, ...]:
    """Return the names in ``text``, in Slurm's order.

    >>> expand("c[1-2,08],login")
    ('c1', 'c2', 'c08', 'login')
    """
    names: list[str] = []
    for word in _words(text):
        choices = [_numbers(match[1]) if match[1] is not None else [match[2]] for match in _PART.finditer(word)]
        names += ("".join(parts) for parts in itertools.islice(itertools.product(*choices), _NODES_MAX))
    return tuple(names)


def _words(text: str) -> list[str]:
    """Split at the commas that stand outside brackets."""
    return [word for word in re.split(r",(?![^\[]*\])", text.strip()) if word and not word.startswith("(")]


def _numbers(ranges: str) -> list[str]:
    out: list[str] = []
    for item in ranges.split(","):
        first, dash, last = item.partition("-")
        if not dash:
            out.append(first)
            continue
        # Slurm pads to the width of the first number: [08-10] is 08, 09, 10.
        span = range(int(first), min(int(last), int(first) + _NODES_MAX) + 1)
        out += (str(number).zfill(len(first)) for number in span)
    return out
