"""What ldmsd is told, word by word; ``test_real_ldmsd`` sees whether it understands."""

import json

import msgspec
import pytest

from carrel.config import Ldms
from carrel.errors import RefusedError
from carrel.ldms import plan
from carrel.model.job import Job, JobKey

SETTINGS = Ldms(plugins=("meminfo", "procstat2"), auth_options=("socket=/run/munge/m",))


def place(*, job_id: int = 102, user: str = "userB", node: str = "c2", port: int = 10101) -> plan.Place:
    key = JobKey(cluster="alpha", job_id=job_id, submit_s=1731000000)
    job = Job(key=key, state="running", user=user, uid=1001, gid=1002)
    return plan.Place(job=job, node=node, host="c2.example", port=port)


def test_a_sampler_is_told_whose_it_is_and_how_often() -> None:
    assert plan.sampler(place(), SETTINGS, period_s=1).splitlines() == [
        "auth_add name=carrel_auth plugin=munge socket=/run/munge/m",
        "listen xprt=sock port=10101 auth=carrel_auth",
        "load name=meminfo",
        (
            "config name=meminfo producer=userB-102-c2 instance=userB-102-c2/meminfo component_id=102 "
            "uid=1001 gid=1002 perm=0440"
        ),
        "start name=meminfo interval=1000000us offset=0",
        "load name=procstat2",
        (
            "config name=procstat2 producer=userB-102-c2 instance=userB-102-c2/procstat2 component_id=102 "
            "uid=1001 gid=1002 perm=0440"
        ),
        "start name=procstat2 interval=1000000us offset=0",
    ]


def test_the_six_samplers_of_the_proof_of_concept_are_the_default() -> None:
    text = plan.sampler(place(), Ldms(), period_s=1)
    assert [line.removeprefix("load name=") for line in text.splitlines() if line.startswith("load ")] == [
        "meminfo",
        "vmstat",
        "dstat",
        "loadavg",
        "procinterrupts",
        "procstat2",
    ]


def test_the_aggregator_sends_a_job_to_its_own_directory() -> None:
    assert plan.begin(place(), SETTINGS, period_s=1, decomposition="/store/as_is.json") == [
        "prdcr_add name=c2-10101 host=c2.example port=10101 xprt=sock type=active reconnect=1000000us auth=carrel_auth",
        "strgp_add name=j102_0_c2_meminfo plugin=store_csv container=userB/102/c2 schema=meminfo",
        r"strgp_prdcr_add name=j102_0_c2_meminfo regex=^c2\-10101$",
        "strgp_start name=j102_0_c2_meminfo",
        (
            "strgp_add name=j102_0_c2_procstat2 plugin=store_csv container=userB/102/c2 regex=^procstat2$ "
            "decomposition=/store/as_is.json"
        ),
        r"strgp_prdcr_add name=j102_0_c2_procstat2 regex=^c2\-10101$",
        "strgp_start name=j102_0_c2_procstat2",
        "prdcr_start name=c2-10101",
        "updtr_add name=j102_0_c2 interval=1000000us offset=100000us",
        r"updtr_prdcr_add name=j102_0_c2 regex=^c2\-10101$",
        "updtr_start name=j102_0_c2",
    ]


def test_at_the_end_all_goes_but_the_producer() -> None:
    begun = {line.split()[1] for line in plan.begin(place(), SETTINGS, period_s=1, decomposition="x") if "_add" in line}
    ended = {line.split()[1] for line in plan.end(place(), SETTINGS) if "_del" in line}
    assert begun - ended == {"name=c2-10101"}


def test_two_jobs_of_a_node_share_no_name_and_no_port() -> None:
    both = [
        plan.begin(place(job_id=number, port=port), SETTINGS, period_s=1, decomposition="x")
        for number, port in ((1, 10101), (2, 10102))
    ]
    names = [{line.split()[1] for line in lines} for lines in both]
    assert not names[0] & names[1]


def test_without_kafka_the_aggregator_loads_no_store_for_it() -> None:
    assert "kafka" not in plan.aggregator(Ldms())


def test_rows_of_all_jobs_go_to_kafka_too_where_it_is_named() -> None:
    settings = Ldms(kafka="k1:9092,k2:9092", kafka_conf="/etc/ldms/kafka.conf", auth="none")
    assert plan.aggregator(settings, decomposition="/store/as_is.json").splitlines() == [
        "listen xprt=sock port=20001",
        "load name=store_csv",
        "config name=store_csv path=/var/lib/carrel/ldms buffer=0",
        "load name=store_avro_kafka",
        "config name=store_avro_kafka encoding=json topic=ldms.%S kafka_conf=/etc/ldms/kafka.conf",
        (
            "strgp_add name=kafka plugin=store_avro_kafka container=k1:9092,k2:9092 regex=.* "
            "decomposition=/store/as_is.json"
        ),
        "strgp_prdcr_add name=kafka regex=.*",
        "strgp_start name=kafka",
    ]


def test_the_decomposition_passes_sets_on_as_they_are() -> None:
    assert json.loads(plan.as_is())["type"] == "as_is"


@pytest.mark.parametrize(
    "name", ["../root", "a b", "a\nload name=x", "a;b", "", "-v", ".hidden", "a/b", "é", "x" * 300]
)
@pytest.mark.parametrize("field", ["user", "node"])
def test_a_name_that_would_be_two_words_or_another_directory_is_refused(name: str, field: str) -> None:
    hostile = place(**{field: name})  # type: ignore[arg-type]  # one of two texts
    with pytest.raises(RefusedError, match="is no name that LDMS can be told"):
        plan.sampler(hostile, SETTINGS, period_s=1)
    with pytest.raises(RefusedError, match="is no name that LDMS can be told"):
        plan.begin(hostile, SETTINGS, period_s=1, decomposition="x")


def test_an_interval_is_changed_at_both_ends() -> None:
    assert plan.resample(SETTINGS, period_s=0.1).splitlines()[:2] == [
        "stop name=meminfo",
        "start name=meminfo interval=100000us offset=0",
    ]
    assert plan.repull(place(), period_s=0.1) == [
        "updtr_stop name=j102_0_c2",
        "updtr_start name=j102_0_c2 interval=100000us offset=10000us",
    ]


def test_a_regular_expression_names_one_producer_only() -> None:
    dotted = msgspec.structs.replace(place(), node="c2.a")
    lines = plan.begin(dotted, SETTINGS, period_s=1, decomposition="x")
    assert r"updtr_prdcr_add name=j102_0_c2.a regex=^c2\.a\-10101$" in lines
