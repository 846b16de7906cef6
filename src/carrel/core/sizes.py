"""Amounts of memory as people write them for Slurm: ``512M``, ``4G``; a bare number is in MiB."""

import re

from carrel.errors import UsageError

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", re.IGNORECASE)
_BYTES = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40}


def memory_bytes(text: str) -> int:
    """Return an amount in bytes.

    Raises:
        UsageError: it is no amount.

    >>> memory_bytes("512"), memory_bytes("1.5G") == 1536 * 2**20
    (536870912, True)
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no amount of memory like 512M or 4G")
    return int(float(match[1]) * _BYTES[match[2].upper()])
