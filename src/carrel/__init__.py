"""Carrel gives every Slurm job its own guest, a paid-up account, and a record of what it used."""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(job: int, *, root: Path | str | None = None, constants: bool = False) -> Any:
    """Return the samples of a job's latest run as a pandas DataFrame, also while it runs.

    Args:
        job: Slurm's job id.
        root: Where samples are; by default the configuration's ``metrics.root``.
        constants: Also the metrics that never changed.

    Raises:
        NotFoundError: there are none that you may read.
        CarrelError: pandas is not installed (``pip install carrel[frames]``), or a file is damaged.
    """
    # ``import carrel`` alone stays light.
    from carrel import config  # noqa: PLC0415
    from carrel.sampling import reading  # noqa: PLC0415

    where = Path(root) if root is not None else Path(config.load().metrics.root)
    return reading.frame(reading.find(where, job), constants=constants)
