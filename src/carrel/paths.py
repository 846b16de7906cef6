"""Where Carrel's own files are: installed on a system, or built in a source checkout.

An installed Carrel uses ``/usr/libexec/carrel`` and ``/var/lib/carrel/images``. In a checkout, the same
files are below ``build/``, so that two checkouts never share anything.
"""

import os
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]


def _in_checkout(*parts: str) -> Path | None:
    if (_CHECKOUT / "Makefile").exists() and (_CHECKOUT / "guest" / "protocol.h").exists():
        return _CHECKOUT.joinpath("build", *parts)
    return None


def libexec() -> Path:
    """Return the directory of the C programs, ``carrel-hook`` and ``spank_carrel.so``."""
    if named := os.environ.get("CARREL_LIBEXEC"):
        return Path(named)
    return _in_checkout("libexec") or Path("/usr/libexec/carrel")


def image_store() -> Path:
    """Return the image store that is used when the configuration names none."""
    if named := os.environ.get("CARREL_IMAGE_STORE"):
        return Path(named)
    return _in_checkout("images") or Path("/var/lib/carrel/images")


def template_store() -> Path:
    """Return the directory of templates that is used when the configuration names none."""
    if named := os.environ.get("CARREL_TEMPLATE_STORE"):
        return Path(named)
    return _in_checkout("templates") or Path("/var/lib/carrel/templates")


def config_file() -> Path | None:
    """Return the configuration in force, or None where there is none and the defaults apply.

    ``CARREL_CONFIG``, else ``carrel.toml`` beside ``SLURM_CONF``, else ``/etc/carrel/carrel.toml``.
    """
    if named := os.environ.get("CARREL_CONFIG"):
        return Path(named)
    candidates = []
    if slurm_conf := os.environ.get("SLURM_CONF"):
        candidates.append(Path(slurm_conf).with_name("carrel.toml"))
    candidates.append(Path("/etc/carrel/carrel.toml"))
    return next((path for path in candidates if path.exists()), None)
