"""What sbatch would submit, from its arguments, its variables and the script."""

import re
from pathlib import Path
from typing import Any

import pytest

from carrel.errors import UsageError
from carrel.model.request import Gpus, Request
from carrel.slurm import sbatch


def asked(*words: str, script: str = "", environment: dict[str, str] | None = None) -> Request:
    (component,) = sbatch.parse(words, script=script, environment=environment or {})
    return component


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ([], {}),
        (["-N2"], {"min_nodes": 2, "max_nodes": 2}),
        (["--nodes=1-3"], {"min_nodes": 1, "max_nodes": 3}),
        (["-N", "1k"], {"min_nodes": 1024, "max_nodes": 1024}),
        (["-n4", "-c", "2"], {"tasks": 4, "cpus_per_task": 2}),
        (["-On4"], {"tasks": 4}),
        (["--ntasks-per-n=3"], {"tasks_per_node": 3}),
        (["--cpus-per-t", "3"], {"cpus_per_task": 3}),
        (["--mem=2G"], {"memory_per_node_mib": 2048}),
        (["--mem=0"], {"memory_per_node_mib": 0}),
        (["--mem", "100"], {"memory_per_node_mib": 100}),
        (["--mem=1K"], {"memory_per_node_mib": 1}),
        (["--mem=1T", "--mem-per-cpu=5M"], {"memory_per_cpu_mib": 5}),
        (["-G", "a100:2,v100"], {"gpus": Gpus(per_job={"a100": 2, "v100": 1})}),
        (["--gpus-per-node=2", "--cpus-per-gpu=3"], {"gpus": Gpus(per_node={"": 2}, cpus_each=3)}),
        (["--gres=gpu:a100:2,net:1"], {"gpus": Gpus(per_node={"a100": 2}), "gres": {"net": 1}}),
        (["--gres=gres/gpu"], {"gpus": Gpus(per_node={"": 1})}),
        (["--gres=none"], {}),
        (["--gpus-per-task=1", "--mem-per-gpu=1G"], {"gpus": Gpus(per_task={"": 1}, memory_each_mib=1024)}),
        (["--tres-per-task=cpu:4,gres/gpu:a100:2"], {"cpus_per_task": 4, "gpus": Gpus(per_task={"a100": 2})}),
        (["--tres-per-task=cpu=4"], {"cpus_per_task": 4}),
        (["--exclusive"], {"whole_nodes": "--exclusive"}),
        (["--exclusive=user"], {}),
        (["-S1"], {"whole_nodes": "--core-spec"}),
        (["-B2:4"], {"whole_cpus": "--extra-node-info"}),
        (["--hint=memory_bound"], {"whole_cpus": "--hint=memory_bound"}),
        (["--hint=nomultithread"], {"threads_per_core": 1}),
        (["-w", "c[1-3],d"], {"named_nodes": 4}),
        (["-L", "matlab:2,ansys@flex|gauss"], {"licences": {"matlab": 2, "ansys@flex": 1, "gauss": 1}}),
        (
            ["-p", "a,b", "-q", "low", "-A", "physics"],
            {"partitions": ("a", "b"), "qos": ("low",), "account": "physics"},
        ),
        (["--array=0-15:4,3%2"], {"array_tasks": 5, "array_at_once": 2}),
        (["-a", "1-3"], {"array_tasks": 3}),
        (["--guest=debian12", "--guest-per=task"], {"guest": True, "guest_per_task": True}),
        (["--guest-root", "--carrel-report", "-n2"], {"tasks": 2}),
        (["--cloud=kvm"], {"guest": True}),
        (["--cloud-type=kvm", "--cloud-create=yes"], {"guest": True}),
        (["--of-a-site-plugin=1", "-n2"], {"tasks": 2}),
        (["-n2", "--", "--nodes=3"], {"tasks": 2}),
        (["-n2", "job.sh", "--nodes=3"], {"tasks": 2}),
    ],
)
def test_an_option_is_read_as_sbatch_reads_it(words: list[str], fields: dict[str, Any]) -> None:
    assert asked(*words) == Request(**fields)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5460),
        ("1:30:00", 5400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:01", 131460),
        ("0", "unlimited"),
        ("UNLIMITED", "unlimited"),
        ("infinite", "unlimited"),
    ],
)
def test_a_time_is_rounded_up_to_minutes(text: str, seconds: int | str) -> None:
    assert asked("-t", text).time_limit == seconds


def test_the_command_line_goes_before_the_variables_and_those_before_the_script() -> None:
    script = (
        "#!/bin/sh\n#SBATCH -n 2 -c2\n#SBATCH --mem=1G -p script # why\n\n# words\n#SBATCH -t 5\ntrue\n#SBATCH -n 9\n"
    )
    variables = {"SBATCH_PARTITION": "variable", "SBATCH_TIMELIMIT": "7", "SBATCH_MEM_PER_CPU": "10"}
    found = asked("-t", "9", "job.sh", script=script, environment=variables)
    assert found == Request(tasks=2, cpus_per_task=2, partitions=("variable",), time_limit=540, memory_per_cpu_mib=10)


def test_a_quoted_value_in_a_script_is_one_word() -> None:
    assert asked(script='#!/bin/sh\n#SBATCH --comment "-n 9" -n3\n').tasks == 3


def test_wrap_takes_no_script() -> None:
    assert asked("--wrap", "true", script="#SBATCH -n 9\n").tasks is None
    assert sbatch.script_of(["--wrap=true"]) == ""
    assert sbatch.script_of(["-n2", "job.sh", "x"]) == "job.sh"
    assert sbatch.script_of(["-n2"]) == ""


def test_components_are_parted_by_a_colon_and_by_hetjob_lines() -> None:
    script = "#!/bin/sh\n#SBATCH -n 1 -t 5 -q premium -p a\n#SBATCH hetjob\n#SBATCH -n 2\n"
    found = sbatch.parse(["-c1", ":", "-c2", ":", "-t9", "job.sh"], script=script, environment={})
    assert found == (
        Request(tasks=1, cpus_per_task=1, time_limit=300, qos=("premium",), partitions=("a",)),
        Request(tasks=2, cpus_per_task=2, time_limit=300, qos=("premium",)),
        Request(time_limit=540, qos=("premium",)),
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--frobnicate"], "write --frobnicate=VALUE"),
        (["--nt", "3"], "write --nt=VALUE"),
        (["-Z"], "-Z: no option of sbatch"),
        (["-n"], "-n wants a value"),
        (["--ntasks"], "--ntasks wants a value"),
        (["-n", "-3"], "--ntasks '-3': not a number"),
        (["-n", "99999999999"], "not a number"),
        (["-N", "0"], "--nodes '0': not a number of nodes"),
        (["-N", "x"], "--nodes 'x'"),
        (["-t", "soon"], "--time 'soon': not a time"),
        (["--mem=many"], "--mem 'many': not an amount"),
        (["--array=9-1"], "9-1 is no range of tasks"),
        (["--array=0-99999999999"], "is no range of tasks"),
        (["--array=1%x"], "not a list of tasks"),
        (["--gpus=a:b:c"], "--gpus 'a:b:c'"),
        (["--gres=:3"], "--gres ':3'"),
        (["-L", "m:x"], "--licenses 'm:x'"),
        (["--tres-per-task=cpu"], "--tres-per-task 'cpu'"),
        (["-F", "hosts"], "a file of node names is not read here"),
        (["-w", "./hosts"], "a file of node names is not read here"),
        (["-a1-2", ":", "-n1"], "no array of heterogeneous jobs"),
    ],
)
def test_what_sbatch_would_not_take_is_refused_in_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        sbatch.parse(words, script="", environment={})
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("#PBS -l nodes=3", "#PBS lines: sbatch may obey them"),
        ("#SBATCH -n 3 more", "'more' is no option"),
        ("#SBATCH --comment 'x", "No closing quotation"),
    ],
)
def test_a_script_that_cannot_be_read_for_certain_is_refused(line: str, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        asked(script=f"#!/bin/sh\n{line}\n")
    assert sentence in str(refused.value)


def test_every_option_of_our_plug_in_is_read_with_its_value_or_without() -> None:
    source = (Path(__file__).parents[2] / "slurm" / "spank_carrel.c").read_text()
    found = re.findall(r'\[[A-Z_]+\] = \{\s*(?:\.option = )?"([a-z-]+)",\s*("|NULL)', source)
    assert {"guest", "guest-root", "cloud", "carrel-report"} <= {name for name, _ in found}
    for name, argument in found:
        words = [f"--{name}"] if argument == "NULL" else [f"--{name}", "4"]
        assert asked(*words, "-n2").tasks == 2, name


def test_an_option_of_a_guest_may_stand_in_the_environment_where_nobody_gives_it() -> None:
    environment = {"CARREL_GUEST": "debian12", "CARREL_GUEST_PER": "task"}
    request = asked("-n2", environment=environment)
    assert (request.guest, request.guest_per_task) == (True, True)
    assert not asked(script="#SBATCH --guest-per=job\n", environment=environment).guest_per_task
    assert not asked(environment={"CARREL_GUEST": ""}).guest
