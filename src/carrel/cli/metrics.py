"""``carrel metrics``: samples that LDMS took, and what LDMS is told here."""

import os
import pwd
import socket
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from carrel import config
from carrel.cli import output
from carrel.daemons import ldms_import
from carrel.errors import NotFoundError, UsageError
from carrel.ldms import plan
from carrel.model.job import Job, JobKey

app = App(name="metrics", help="Samples that LDMS took, and what LDMS is told here.")


@app.command(name="import-ldms")
def import_ldms(
    job: Annotated[int, Parameter(help="Slurm's job id.")],
    files: Annotated[list[Path], Parameter(help="LDMS's CSV files; by default those below ldms.store_dir.")]
    | None = None,
    /,
    *,
    user: Annotated[str, Parameter(show_default=False, help="Whose job it was; by default yours.")] = "",
    node: Annotated[str, Parameter(show_default=False, help="Of which node the files are; needed with files.")] = "",
    submitted: Annotated[
        int, Parameter(show_default=False, help="When the run was submitted, in seconds since 1970.")
    ] = 0,
    root: Annotated[Path | None, Parameter(help="Where to; by default metrics.root.")] = None,
) -> None:
    """Make files of a job that LDMS sampled, for carrel job report, carrel job plot and carrel.load."""
    settings = config.load()
    whose = _entry(user)
    key = JobKey(cluster=socket.gethostname(), job_id=job, submit_s=submitted)
    described = Job(key=key, state="ended", user=whose.pw_name, uid=whose.pw_uid, gid=whose.pw_gid)
    if files and not node:
        raise UsageError("files of which node? say --node; see: carrel metrics import-ldms --help")
    by_node = {node: files} if files else ldms_import.nodes_of(Path(settings.ldms.store_dir), described)
    where = root or Path(settings.metrics.root)
    for name, found in sorted(by_node.items()):
        path, samples = ldms_import.load(described, found, where, node=name, formats=settings.metrics.formats)
        print(f"{samples} samples of {output.printable(name)} are in {path}")


def _entry(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())
    except KeyError as error:
        raise NotFoundError(f"there is no user {user or os.getuid()} here; see: --user") from error


@app.command(name="ldms-config")
def ldms_config(part: Literal["aggregator", "decomposition"] = "aggregator", /) -> None:
    """Print the configuration of the site's aggregator, or the decomposition that it and its policies name."""
    settings = config.load().ldms
    where = f"{settings.store_dir}/as_is.json"
    print(plan.aggregator(settings, decomposition=where) if part == "aggregator" else plan.as_is(), end="")
