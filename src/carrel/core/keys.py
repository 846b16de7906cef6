"""Which guest may hold the cluster's munge key: whoever has the key can be anybody in the cluster, root too.

A firewall is no cure, since a node must reach slurmctld; so such a guest is not made. See
``docs/explanation/secrets-in-guests.md``.
"""

import msgspec

from carrel.errors import RefusedError
from carrel.model.guest import GuestRequest
from carrel.model.template import Slurmd


class ImageTrust(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of where an image, or a virtual machine that is cloned, comes from."""

    name: str
    from_site: bool
    """The site put it there; else a user brought it."""
    trusted: bool
    """The site's word that no user of a guest made from it can become root there: no sudo, no password of root's, no
    boot loader to talk to, nothing of the image's own that a user may write and root runs."""
    user_data: bool = False
    """The guest runs a script as root when it starts, which the request may choose."""


class KeyChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the guest may hold the key, and why, as a sentence."""

    allowed: bool
    why: str


def may_hold_key(request: GuestRequest, image: ImageTrust, *, slurmd: Slurmd) -> KeyChoice:
    """Return whether a guest for this request may hold the munge key.

    A guest beside whose host's slurmd it stands needs none, and never gets one: its tasks enter through the agent.
    """
    instead = 'leave the guest\'s slurmd on its host (slurmd = "host")'
    if slurmd == "host":
        return KeyChoice(allowed=False, why=f"its slurmd runs on its host, so {image.name} needs no munge key")
    if request.root:
        return KeyChoice(
            allowed=False,
            why=f"--guest-root: root in a guest that is a node could read the munge key and be any user of the "
            f"cluster; leave out --guest-root, or {instead}",
        )
    if not image.from_site:
        return KeyChoice(
            allowed=False,
            why=f"image {image.name} was brought by a user, who may have put anything in it that reads the munge key; "
            f"use an image of the site, or {instead}",
        )
    if image.user_data:
        return KeyChoice(
            allowed=False,
            why=f"image {image.name} runs a script of the request as root when it starts, which could read the munge "
            f"key; leave out the script, or {instead}",
        )
    if not image.trusted:
        return KeyChoice(
            allowed=False,
            why=f"nobody has said that users cannot become root in guests of {image.name}; if that is so, "
            f"write trusted = true in its section of the template file, or {instead}",
        )
    return KeyChoice(allowed=True, why=f"{image.name} is the site's, and trusted = true in the template file")


def refuse_key(request: GuestRequest, image: ImageTrust, *, slurmd: Slurmd) -> None:
    """Refuse a request whose guest must hold the munge key and may not.

    Raises:
        RefusedError: the user reads the sentence; nothing was cloned yet.
    """
    choice = may_hold_key(request, image, slurmd=slurmd)
    if slurmd == "guest" and not choice.allowed:
        raise RefusedError(choice.why)
