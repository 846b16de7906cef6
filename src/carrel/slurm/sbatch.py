"""What ``sbatch`` would submit: its arguments, ``SBATCH_*`` variables and ``#SBATCH`` lines, read as it reads them.

The command line goes before the environment, that before the script. Options stop at the first word that is none;
of the script only the comment lines before its first command count. Parts of a heterogeneous job are separated by
a lone ``:`` on the command line and by ``#SBATCH hetjob`` in the script.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from carrel.errors import UsageError
from carrel.model.request import ByType, Gpus, Request, TimeLimit
from carrel.slurm import hostlist

_LETTERS = """
A=account a=array b=begin B=extra-node-info c=cpus-per-task C=constraint D=chdir d=dependency e=error F=nodefile
G=gpus H=hold h=help i=input I=immediate J=job-name k=no-kill L=licenses M=clusters m=distribution N=nodes
n=ntasks o=output O=overcommit p=partition q=qos Q=quiet S=core-spec s=oversubscribe t=time v=verbose V=version
w=nodelist W=wait x=exclude
"""
_BARE = """
carrel-report contiguous exclusive get-user-env guest-root help hold ignore-pbs nice no-kill no-requeue overcommit
oversubscribe parsable propagate quiet reboot requeue share spread-job stepmgr test-only usage use-min-nodes verbose
version wait
"""
"""Without a value, or with one that only ``=`` can bring."""
_WITH_VALUE = """
account acctg-freq array batch bb bbf begin chdir cloud cloud-create cloud-type cluster-constraint clusters comment
constraint container container-id core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot
dependency distribution error exclude export export-file extra extra-node-info gid gpu-bind gpu-freq gpus
gpus-per-node gpus-per-socket gpus-per-task gres gres-flags guest guest-boot-timeout guest-clone guest-driver
guest-mount guest-per hint immediate input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem
mem-bind mem-per-cpu mem-per-gpu mincpus network nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu
ntasks-per-node ntasks-per-socket open-mode output partition power prefer priority profile qos reservation
resv-ports segment signal sockets-per-node switches thread-spec threads-per-core time time-min tmp tres-bind
tres-per-task uid wait-all-nodes wckey wrap
"""
_SHORT = dict(item.split("=") for item in _LETTERS.split())
_FLAGS = frozenset(_BARE.split())
_VALUED = frozenset(_WITH_VALUE.split())
_VARIABLES = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_ARRAY_INX": "array",
    "SBATCH_CORE_SPEC": "core-spec",
    "SBATCH_CPUS_PER_GPU": "cpus-per-gpu",
    "SBATCH_EXCLUSIVE": "exclusive",
    "SBATCH_GPUS": "gpus",
    "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_GPUS_PER_SOCKET": "gpus-per-socket",
    "SBATCH_GPUS_PER_TASK": "gpus-per-task",
    "SBATCH_GRES": "gres",
    "SBATCH_HINT": "hint",
    "SLURM_HINT": "hint",
    "SBATCH_MEM_PER_CPU": "mem-per-cpu",
    "SBATCH_MEM_PER_GPU": "mem-per-gpu",
    "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_OVERCOMMIT": "overcommit",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_SPREAD_JOB": "spread-job",
    "SBATCH_THREAD_SPEC": "thread-spec",
    "SBATCH_THREADS_PER_CORE": "threads-per-core",
    "SBATCH_TIMELIMIT": "time",
}
_OF_GUESTS = {"CARREL_GUEST": "guest", "CARREL_GUEST_PER": "guest-per"}
"""Stand in for absent options: Carrel's plug-in reads them when all others were."""
_WHOLE_NODES = ("core-spec", "thread-spec", "gpus-per-socket")
_WHOLE_CPUS = ("extra-node-info", "sockets-per-node", "cores-per-socket", "ntasks-per-socket")
_INHERITED = ("account", "time", "qos")
"""What a component of a heterogeneous job has from the first one, unless it says otherwise."""

_MEMORY_FORMS = ("mem", "mem-per-cpu", "mem-per-gpu")
_ARRAY_TASKS_MAX = 4_000_001
"""Slurm's own limit of ``MaxArraySize``."""

_MEMORY = re.compile(r"(\d+)([KMGTP]?)B?", re.IGNORECASE)
_MIB = {"K": Fraction(1, 1024), "": Fraction(1), "M": Fraction(1), "G": Fraction(2**10), "T": Fraction(2**20)}

Options = dict[str, str]


def script_of(words: Sequence[str]) -> str:
    """Return the script that the command line names; empty: ``--wrap``, or standard input."""
    parts, rest = _split(words)
    return "" if any("wrap" in part for part in parts) or not rest else rest[0]


def parse(words: Sequence[str], *, script: str, environment: Mapping[str, str]) -> tuple[Request, ...]:
    """Return the components of what ``sbatch WORDS`` would submit: one, or those of a heterogeneous job.

    Args:
        words: The command line without ``sbatch``.
        script: The text of the file that ``script_of`` named.
        environment: Its ``SBATCH_*`` variables count, and those that stand in for the options of guests.

    Raises:
        UsageError: an option is unknown, or a value is not what sbatch takes.
    """
    parts, _ = _split(words)
    sections = [dict[str, str]()] if "wrap" in parts[0] else _sections(script)
    variables = {name: environment[key] for key, name in _VARIABLES.items() if key in environment}
    guests = {name: environment[key] for key, name in _OF_GUESTS.items() if environment.get(key)}
    components: list[Request] = []
    first: Options = {}
    for at in range(max(len(parts), len(sections))):
        options: Options = {}
        for layer in (sections[at : at + 1], [variables], parts[at : at + 1]):
            _lay_over(options, layer[0] if layer else {})
        if components:
            # As sbatch does; the rest each component says for itself.
            options = {name: first[name] for name in _INHERITED if name in first} | options
        else:
            first = options
        components.append(_request(guests | options))
    if len(components) > 1 and any(each.array_tasks > 1 for each in components):
        raise UsageError("--array: sbatch takes no array of heterogeneous jobs")
    return tuple(components)


def time_limit(text: str) -> TimeLimit:
    """Read ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours[:minutes[:seconds]]``.

    Slurm keeps whole minutes and rounds up.

    >>> time_limit("1-12"), time_limit("90:30"), time_limit("0")
    (129600, 5460, 'unlimited')
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return "unlimited"
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise UsageError(f"--time {text!r}: not a time; write minutes, hours:minutes:seconds or days-hours")
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        seconds = ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    elif third is not None:
        seconds = ((first or 0) * 60 + (second or 0)) * 60 + third
    else:
        seconds = (first or 0) * 60 + (second or 0)
    return -(-seconds // 60) * 60 or "unlimited"


def array(text: str) -> tuple[int, int | None]:
    """Return how many tasks ``--array`` makes, and how many may run at once.

    >>> array("0-15:4,3%2")
    (5, 2)
    """
    spec, percent, window = text.partition("%")
    found: set[int] = set()
    for item in spec.strip("[]").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", item.strip())
        if not match or (percent and not window.isdigit()):
            raise UsageError(f"--array {text!r}: not a list of tasks like 0-15, 1,3,5 or 0-99%10")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or step < 1 or last >= _ARRAY_TASKS_MAX:
            raise UsageError(f"--array {text!r}: {item} is no range of tasks")
        found.update(range(first, last + 1, step))
    return len(found), int(window) if percent and int(window) else None


def _split(words: Sequence[str]) -> tuple[list[Options], list[str]]:
    """Return the options of each component, and the words from the script on."""
    rest = list(words)
    parts = []
    while True:
        options, rest = _options(rest)
        parts.append(options)
        if rest[:1] != [":"]:
            return parts, rest
        rest = rest[1:]


def _options(words: list[str]) -> tuple[Options, list[str]]:
    """Read options until a word that is none; getopt's rules, abbreviations of long names among them."""
    options: Options = {}
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        for name, value in _long(word, rest) if word.startswith("--") else _letters(word, rest):
            _lay_over(options, {name: value})
    return options, rest


def _long(word: str, rest: list[str]) -> Iterator[tuple[str, str]]:
    name, equals, value = word[2:].partition("=")
    known = [name] if name in _FLAGS | _VALUED else [each for each in _FLAGS | _VALUED if each.startswith(name)]
    if len(known) != 1:
        if not known and equals:
            # An option of the site's own plug-ins; Slurm's own are all known.
            return
        raise UsageError(f"{word}: sbatch's options are known here, and this is none; write --{name}=VALUE")
    if known[0] in _VALUED and not equals:
        if not rest:
            raise UsageError(f"--{known[0]} wants a value")
        value = rest.pop(0)
    yield known[0], value


def _letters(word: str, rest: list[str]) -> Iterator[tuple[str, str]]:
    letters = word[1:]
    while letters:
        letter, letters = letters[0], letters[1:]
        name = _SHORT.get(letter)
        if name is None:
            raise UsageError(f"-{letter}: no option of sbatch; see: sbatch --help")
        if name in _VALUED:
            if not letters and not rest:
                raise UsageError(f"-{letter} wants a value")
            yield name, letters or rest.pop(0)
            return
        yield name, ""


def _lay_over(options: Options, more: Options) -> None:
    """Add what is said later; of the three ways to ask for memory the last one said is meant."""
    for name, value in more.items():
        if name in _MEMORY_FORMS:
            for other in _MEMORY_FORMS:
                options.pop(other, None)
        options[name] = value


def _sections(script: str) -> list[Options]:
    """Return the options of a script's ``#SBATCH`` lines, for each part of a heterogeneous job."""
    sections: list[Options] = [{}]
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith(("#PBS", "#BSUB")):
            raise UsageError(f"{line.split()[0]} lines: sbatch may obey them, carrel quote cannot; write #SBATCH lines")
        if not line.startswith("#SBATCH"):
            continue
        try:
            words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        except ValueError as error:
            raise UsageError(f"{line!r}: {error}") from error
        if words[:1] in (["hetjob"], ["packjob"]):
            sections.append({})
            continue
        options, rest = _options(words)
        if rest:
            raise UsageError(f"{line!r}: {rest[0]!r} is no option")
        _lay_over(sections[-1], options)
    return sections


def _request(options: Options) -> Request:
    low, high = _nodes(options.get("nodes"))
    tasks, at_once = array(options["array"]) if "array" in options else (1, None)
    per_task = _tres_per_task(options.get("tres-per-task", ""))
    others, gres_gpus = gres(options.get("gres", ""))
    if "nodefile" in options or "/" in options.get("nodelist", ""):
        raise UsageError("a file of node names is not read here; name the nodes with --nodelist")
    return Request(
        partitions=_names(options.get("partition")),
        qos=_names(options.get("qos")),
        account=options.get("account", ""),
        time_limit=time_limit(options["time"]) if "time" in options else None,
        min_nodes=low,
        max_nodes=high,
        named_nodes=len(hostlist.expand(options.get("nodelist", ""))),
        spread="spread-job" in options,
        tasks=_number(options, "ntasks"),
        tasks_per_node=_number(options, "ntasks-per-node"),
        tasks_per_core=_number(options, "ntasks-per-core"),
        cpus_per_task=per_task.get("cpu") or _number(options, "cpus-per-task"),
        cpus_per_node=_number(options, "mincpus"),
        threads_per_core=1 if options.get("hint") == "nomultithread" else _number(options, "threads-per-core"),
        memory_per_node_mib=_memory(options, "mem"),
        memory_per_cpu_mib=_memory(options, "mem-per-cpu"),
        gpus=Gpus(
            per_job=_by_type(options, "gpus"),
            per_node=Counter(_by_type(options, "gpus-per-node")) + Counter(gres_gpus),
            per_task=_by_type(options, "gpus-per-task")
            or {name[9:]: count for name, count in per_task.items() if name.startswith("gres/gpu")},
            per_socket=_by_type(options, "gpus-per-socket"),
            cpus_each=_number(options, "cpus-per-gpu"),
            tasks_each=_number(options, "ntasks-per-gpu"),
            memory_each_mib=_memory(options, "mem-per-gpu"),
        ),
        gres=others,
        licences=licences(options.get("licenses", "")),
        whole_nodes=_whole_nodes(options),
        whole_cpus=_whole_cpus(options),
        array_tasks=tasks,
        array_at_once=at_once,
        guest=any(options.get(name) for name in ("guest", "cloud", "cloud-type")),
        guest_per_task=options.get("guest-per") == "task",
    )


def _whole_nodes(options: Options) -> str:
    if options.get("exclusive") in ("", "exclusive", "yes"):
        return "--exclusive"
    return next((f"--{name}" for name in _WHOLE_NODES if name in options), "")


def _whole_cpus(options: Options) -> str:
    if options.get("hint") in ("compute_bound", "memory_bound"):
        return f"--hint={options['hint']}"
    return next((f"--{name}" for name in _WHOLE_CPUS if name in options), "")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (text or "").split(",")))


def _number(options: Options, name: str) -> int | None:
    text = options.get(name)
    if text is None:
        return None
    if not text.isdigit() or int(text) >= 2**31:
        raise UsageError(f"--{name} {text!r}: not a number")
    return int(text) or None


def _nodes(text: str | None) -> tuple[int | None, int | None]:
    """Read ``2``, ``1-3``, ``1k``, or since 23.11 ``1,3,5-7``."""
    if text is None:
        return None, None
    sizes = []
    for item in re.split(r"[-,]", text):
        match = re.fullmatch(r"(\d+)([kKmM]?)(?::\d+)?", item)
        if not match or not int(match[1]):
            raise UsageError(f"--nodes {text!r}: not a number of nodes like 2 or 1-3")
        sizes.append(int(match[1]) * {"": 1, "K": 1024, "M": 1024**2}[match[2].upper()])
    return min(sizes), max(sizes)


def _memory(options: Options, name: str) -> int | None:
    text = options.get(name)
    if text is None:
        return None
    match = _MEMORY.fullmatch(text)
    if not match or match[2].upper() not in _MIB:
        raise UsageError(f"--{name} {text!r}: not an amount of memory like 500M or 4G")
    amount = int(match[1]) * _MIB[match[2].upper()]
    return -(-amount.numerator // amount.denominator)


def _by_type(options: Options, name: str) -> ByType:
    """Read ``2``, ``a100:2`` or ``a100:1,v100:3``."""
    found: dict[str, int] = {}
    for item in _names(options.get(name)):
        match = re.fullmatch(r"(?:([A-Za-z_][\w.-]*):)?(\d+)|([A-Za-z_][\w.-]*)", item)
        if not match:
            raise UsageError(f"--{name} {options[name]!r}: not GPUs like 2 or a100:2")
        kind = match[1] or match[3] or ""
        found[kind] = found.get(kind, 0) + int(match[2] or 1)
    return found


def gres(text: str) -> tuple[dict[str, int], dict[str, int]]:
    """Read ``gpu:2,craynetwork:1``; GPUs by type apart."""
    others: dict[str, int] = {}
    gpus: dict[str, int] = {}
    for item in filter(lambda word: word not in ("", "none", "NONE"), text.split(",")):
        match = re.fullmatch(r"(?:gres[:/])?([A-Za-z_][\w.-]*)(?::([A-Za-z_][\w.-]*))?(?:[:=](\d+)([KMG]?))?", item)
        if not match:
            raise UsageError(f"--gres {text!r}: not a list like gpu:2 or gpu:a100:1")
        name, kind = match[1], match[2] or ""
        count = int(match[3] or 1) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[4] or ""]
        whole = others if name != "gpu" else gpus
        key = kind if name == "gpu" else f"{name}:{kind}" if kind else name
        whole[key] = whole.get(key, 0) + count
    return others, gpus


def licences(text: str) -> dict[str, int]:
    """Read ``matlab:2,ansys@server``; where Slurm may take one of several (``|``), all are counted."""
    found: dict[str, int] = {}
    for item in filter(None, re.split(r"[,;|]", text)):
        name, _, count = item.replace("=", ":").partition(":")
        if count and not count.isdigit():
            raise UsageError(f"--licenses {text!r}: not a list like matlab:2,ansys")
        found[name] = found.get(name, 0) + int(count or 1)
    return found


def _tres_per_task(text: str) -> dict[str, int]:
    """Read ``cpu:4,gres/gpu:a100:2``, also with ``=``."""
    found: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, _, count = item.replace("=", ":").rpartition(":")
        if not count.isdigit():
            raise UsageError(f"--tres-per-task {text!r}: not a list like cpu:4,gres/gpu:1")
        found[name] = int(count)
    return found
