"""What a virtual machine carries about the guest that it is: the driver remembers nothing else.

It travels with the request that makes the machine, in its ``extraConfig``, so no moment exists at which there is a
machine of ours that nobody could recognise. These keys cannot be read in the guest; those below ``guestinfo.`` can.
"""

import base64
import gzip
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from pyVmomi import vim

from carrel.model.guest import Guest

OWNER = "carrel.owner"
GUEST = "carrel.guest"
TOLD = "guestinfo.carrel."


def machine_name(owner: str, guest: str) -> str:
    """Return the name of a guest's machine: unique in its folder, so that vCenter itself refuses a second one."""
    return f"carrel-{owner}-{guest}"


def marks(owner: str, guest: Guest) -> list[Any]:
    """Return the ``extraConfig`` that makes a machine this guest of this owner."""
    return options({OWNER: owner, GUEST: msgspec.json.encode(guest).decode()})


def told(facts: Mapping[str, str]) -> list[Any]:
    """Return the ``extraConfig`` that tells a guest its facts, each as ``guestinfo.carrel.<name>``."""
    return options({f"{TOLD}{name}": text for name, text in facts.items()})


def cloud_init(kind: Literal["userdata", "metadata"], text: str) -> list[Any]:
    """Return the ``extraConfig`` that gives a script, or who it is, to the guest's cloud-init."""
    packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    return options({f"guestinfo.{kind}": packed, f"guestinfo.{kind}.encoding": "gzip+base64"})


def options(values: Mapping[str, str]) -> list[Any]:
    return [vim.option.OptionValue(key=key, value=value) for key, value in values.items()]


def read(extra_config: Any, *, owner: str) -> Guest | None:
    """Return the guest that a machine is; None: it is none of this owner's, or was not made by us at all."""
    found = {option.key: option.value for option in extra_config or ()}
    if found.get(OWNER) != owner or GUEST not in found:
        return None
    try:
        return msgspec.json.decode(found[GUEST], type=Guest)
    except (msgspec.DecodeError, TypeError):
        return None  # somebody wrote there by hand: not ours to sweep
