"""What ldmsd is told: the configuration of a job's sampler, that of the aggregator, and the commands between them.

LDMS sorts rows by the *producer object* of the aggregator, not by what the sampler calls itself, and such an object can
never be removed again. So each node has a fixed row of ports with one producer object each; a job takes a free port,
and storage policies that know this one producer send its rows to the job's own directory while it lasts.
"""

import json
import re
from collections.abc import Iterator, Sequence

import msgspec

from carrel.config import Ldms
from carrel.errors import RefusedError
from carrel.model.job import Job

PLUGINS: dict[str, str] = {
    "meminfo": "",
    "vmstat": "",
    # All of it that comes from /proc alone; a fixed schema, so that its name does not tell its options.
    "dstat": "io=1 stat=1 fd=1 auto-schema=0",
    "loadavg": "",
    "procinterrupts": "",
    "procstat2": "",
}
"""The samplers of the proof of concept, and what each is told beyond the common."""

ROWS_OF_LISTS = frozenset({"procstat2"})
"""Their sets hold a list with a record for each CPU, which store_csv takes only decomposed."""

AUTH = "carrel_auth"
_UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]")
_NAME_MAX = 200


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A sampler's: its job, on which node, at which port."""

    job: Job
    node: str
    host: str
    """By which the aggregator reaches the node."""
    port: int

    @property
    def producer(self) -> str:
        """Return what the sampler calls itself: ``<user>-<jobid>-<node>``."""
        return f"{word(self.job.user)}-{self.job.key.job_id}-{word(self.node)}"

    @property
    def slot(self) -> str:
        """Return the aggregator's name of the port: ``c1-10101``."""
        return f"{word(self.node)}-{self.port}"

    @property
    def container(self) -> str:
        """Return the directory of the job's rows below the store: ``<user>/<jobid>/<node>``."""
        return f"{word(self.job.user)}/{self.job.key.job_id}/{word(self.node)}"


def word(text: str) -> str:
    """Return a name that is one word of ldmsd's configuration and one component of a path.

    Raises:
        RefusedError: it holds anything else, and might name another's directory.

    >>> word("userA")
    'userA'
    """
    if not text or len(text) > _NAME_MAX or _UNSAFE.search(text) or text.startswith((".", "-")):
        raise RefusedError(f"{text[:40]!r} is no name that LDMS can be told; letters, digits and _.+- are")
    return text


def interval(seconds: float) -> str:
    """Return a time as ldmsd takes it.

    >>> interval(1), interval(0.25)
    ('1000000us', '250000us')
    """
    return f"{round(seconds * 1e6)}us"


def sampler(place: Place, settings: Ldms, *, period_s: float) -> str:
    """Return the configuration of a job's sampler.

    Its sets belong to the job's user and may be read by nobody else; the component is the job, so that rows which lose
    the producer's name on their way still tell whose they are.
    """
    lines = list(_auth(settings))
    lines.append(f"listen xprt=sock port={place.port}{_with_auth(settings)}")
    for name in settings.plugins:
        about = f"producer={place.producer} instance={place.producer}/{name} component_id={place.job.key.job_id}"
        owner = f"uid={place.job.uid} gid={place.job.gid} perm=0440"
        lines.append(f"load name={name}")
        lines.append(f"config name={name} {about} {owner} {PLUGINS.get(name, '')}".rstrip())
        lines.append(f"start name={name} interval={interval(period_s)} offset=0")
    return "\n".join(lines) + "\n"


def resample(settings: Ldms, *, period_s: float) -> str:
    """Return the commands for a sampler to sample this often from now on."""
    pairs = (
        (f"stop name={name}", f"start name={name} interval={interval(period_s)} offset=0") for name in settings.plugins
    )
    return "\n".join(line for pair in pairs for line in pair) + "\n"


def aggregator(settings: Ldms, *, decomposition: str = "") -> str:
    """Return the configuration of the site's aggregator; what concerns single jobs comes later, as commands.

    Args:
        settings: The site's.
        decomposition: The file with ``as_is``, where rows also go to Kafka.
    """
    lines = list(_auth(settings))
    lines.append(f"listen xprt=sock port={settings.aggregator_port}{_with_auth(settings)}")
    lines += ["load name=store_csv", f"config name=store_csv path={settings.store_dir} buffer=0"]
    if settings.kafka:
        way = f"regex=.* decomposition={decomposition}"
        conf = f" kafka_conf={settings.kafka_conf}" if settings.kafka_conf else ""
        lines += [
            "load name=store_avro_kafka",
            f"config name=store_avro_kafka encoding=json topic={settings.topic}{conf}",
            f"strgp_add name=kafka plugin=store_avro_kafka container={settings.kafka} {way}",
            "strgp_prdcr_add name=kafka regex=.*",
            "strgp_start name=kafka",
        ]
    return "\n".join(lines) + "\n"


def as_is() -> str:
    """Return the decomposition that passes every set on as it is: kernels differ in what they count."""
    return json.dumps({"type": "as_is", "indices": [{"name": "time", "cols": ["timestamp"]}]}, indent=1) + "\n"


def begin(place: Place, settings: Ldms, *, period_s: float, decomposition: str) -> Sequence[str]:
    """Return the commands by which the aggregator sends a job's rows to its own directory.

    Each may fail where it was done before. Policies come first: a row without one is lost.
    """
    name = _policy(place)
    lines = []
    for plugin in settings.plugins:
        chosen = f"regex=^{plugin}$ decomposition={decomposition}" if plugin in ROWS_OF_LISTS else f"schema={plugin}"
        lines += [
            f"strgp_add name={name}_{plugin} plugin=store_csv container={place.container} {chosen}",
            f"strgp_prdcr_add name={name}_{plugin} regex=^{re.escape(place.slot)}$",
            f"strgp_start name={name}_{plugin}",
        ]
    # An updater takes only producers that were there before it.
    way = f"host={place.host} port={place.port} xprt=sock type=active reconnect={interval(settings.reconnect_s)}"
    return [
        f"prdcr_add name={place.slot} {way}{_with_auth(settings)}",
        *lines,
        f"prdcr_start name={place.slot}",
        f"updtr_add name={name} {_pull(period_s)}",
        f"updtr_prdcr_add name={name} regex=^{re.escape(place.slot)}$",
        f"updtr_start name={name}",
    ]


def repull(place: Place, *, period_s: float) -> Sequence[str]:
    """Return the commands for the aggregator to pull a job's samples this often from now on."""
    name = _policy(place)
    return [f"updtr_stop name={name}", f"updtr_start name={name} {_pull(period_s)}"]


def _pull(period_s: float) -> str:
    return f"interval={interval(period_s)} offset={interval(min(period_s / 10, 0.1))}"


def end(place: Place, settings: Ldms) -> Sequence[str]:
    """Return the commands that undo ``begin``, less the producer object: it waits for the next job."""
    name = _policy(place)
    lines = [f"updtr_stop name={name}", f"updtr_del name={name}", f"prdcr_stop name={place.slot}"]
    for plugin in settings.plugins:
        lines += [f"strgp_stop name={name}_{plugin}", f"strgp_del name={name}_{plugin}"]
    return lines


def _policy(place: Place) -> str:
    return f"j{place.job.key.job_id}_{place.job.key.restart}_{word(place.node)}"


def _auth(settings: Ldms) -> Iterator[str]:
    if settings.auth != "none":
        options = "".join(f" {option}" for option in settings.auth_options)
        yield f"auth_add name={AUTH} plugin={settings.auth}{options}"


def _with_auth(settings: Ldms) -> str:
    return "" if settings.auth == "none" else f" auth={AUTH}"
