"""The simulator: small histories that can be worked out by hand, and what must hold of any."""

import gzip
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carrel.cli import main
from carrel.config import Launches
from carrel.core.simulation import Busy, Setting, Simulation, Summary
from carrel.core.workload import Arrival, Bursts, Sizes, generate, guests, read_swf
from carrel.errors import CarrelError
from carrel.model.guest import Clone
from carrel.model.host import Demand, Host, Policy

GIB = 2**30
ONE = Demand(cpus=1, memory_bytes=1)
SIZES = Sizes(cpus_max=8, memory_per_cpu_bytes=GIB)
POLICIES: tuple[Policy, ...] = ("first", "random", "best-fit", "least-loaded")


def setting(
    *cpus: int,
    policy: Policy = "best-fit",
    clone: Clone = "instant",
    clone_s: float = 2.0,
    launches: Launches | None = None,
    failures: float = 0.0,
) -> Setting:
    return Setting(
        hosts=tuple(Host(name=f"h{number}", cpus=count, memory_bytes=64 * GIB) for number, count in enumerate(cpus)),
        policy=policy,
        clone=clone,
        clone_s=clone_s,
        launches=launches or Launches(),
        failures=failures,
    )


def test_two_jobs_on_one_cpu_run_one_after_the_other_each_after_its_clone() -> None:
    found = Simulation(setting(1)).run([Arrival(100.0, 10.0, ONE), Arrival(100.0, 20.0, ONE)])
    assert (found.done, found.launches, found.makespan_s) == (2, 2, 34.0)
    assert (found.wait_s.mean, found.wait_s.p95) == ((2 + 14) / 2, 14)
    assert found.utilisation == pytest.approx(30 / 34)
    assert found.cloning == pytest.approx(4 / 34)
    assert found.throughput_per_h == pytest.approx(2 * 3600 / 34)
    assert found.slowdown.mean == pytest.approx((12 / 10 + 34 / 20) / 2)


def test_a_long_simulation_tells_how_far_it_is() -> None:
    told: list[int] = []
    Simulation(setting(1)).run([Arrival(0.0, 1.0, ONE)] * 10, tell=told.append, tell_every=4)
    assert told == [4, 8]


def test_a_job_larger_than_any_host_is_cancelled_and_the_others_run() -> None:
    found = Simulation(setting(4)).run([Arrival(0.0, 1.0, Demand(cpus=5, memory_bytes=1)), Arrival(0.0, 1.0, ONE)])
    assert (found.done, found.cancelled) == (1, 1)


def test_the_limit_of_full_clones_holds_back_a_burst_and_that_of_instant_ones_does_not() -> None:
    jobs = [Arrival(0.0, 1.0, ONE)] * 30
    full = Simulation(setting(64, clone="full")).run(jobs)
    instant = Simulation(setting(64)).run(jobs)
    assert (full.makespan_s, instant.makespan_s) == (123.0, 3.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_a_third_of_all_clones_failing_every_job_ends_or_is_held_and_nothing_stays_taken(policy: Policy) -> None:
    simulation = Simulation(setting(8, 16, 32, policy=policy, failures=0.3))
    before = list(simulation.hosts)
    found = simulation.run(generate(Bursts(jobs=400, burst=100), SIZES, seed=3))
    assert found.done + found.held == 400
    assert found.done > 380
    assert found.launches > 500
    assert list(simulation.hosts) == before


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0, 500), st.floats(0, 500), st.integers(1, 9), st.integers(1, 3)), max_size=30),
    st.sampled_from(POLICIES),
    st.sampled_from([0.0, 20.0, 3600.0]),
)
def test_jobs_are_conserved_and_the_site_is_empty_at_the_end_whatever_comes(
    jobs: list[tuple[float, float, int, int]], policy: Policy, patience_s: float
) -> None:
    arrivals = [
        Arrival(at_s, run_s, Demand(cpus=cpus, memory_bytes=1, count=count))
        for at_s, run_s, cpus, count in sorted(jobs)
    ]
    simulation = Simulation(setting(4, 8, 8, policy=policy, launches=Launches(patience_s=patience_s)))
    before = list(simulation.hosts)
    found = simulation.run(arrivals)
    fits = [8 // each.demand.cpus * 2 + 4 // each.demand.cpus >= each.demand.count for each in arrivals]
    assert (found.done, found.cancelled) == (sum(fits), len(fits) - sum(fits))
    ran_cpu_s = sum(
        each.run_s * each.demand.cpus * each.demand.count for each, fit in zip(arrivals, fits, strict=True) if fit
    )
    assert found.utilisation * 20 * found.makespan_s == pytest.approx(ran_cpu_s, rel=1e-6, abs=1e-3)
    assert found.utilisation + found.cloning <= 1 + 1e-9
    assert list(simulation.hosts) == before


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 1e5), st.integers(-9, 9)), max_size=30))
def test_bins_keep_the_integral_however_wide_they_become(changes: list[tuple[float, int]]) -> None:
    busy, cpus, last_s, expected = Busy(0.0), 0, 0.0, 0.0
    for at_s, change in sorted(changes):
        expected += cpus * (at_s - last_s)
        busy.change(change, at_s)
        cpus, last_s = cpus + change, at_s
    assert busy.cpu_s() == pytest.approx(expected, rel=1e-6, abs=1e-3)
    assert len(busy.bins) <= 1024


def test_a_history_repeats_itself_with_its_seed_and_not_with_another() -> None:
    def history(seed: int) -> Summary:
        return Simulation(setting(8, 8, policy="random", failures=0.1)).run(
            generate(Bursts(jobs=100, burst=50), SIZES, seed=seed)
        )

    assert history(1) == history(1)
    assert history(1) != history(2)


def test_instant_clones_have_the_published_advantage_over_full_ones_in_bursts_beyond_the_limit_of_full_ones() -> None:
    """Multiverse saw 1.5 times the throughput; 75 jobs in 5 minutes are 1.5 times the limit."""
    bursts = Bursts(jobs=3000, burst=75, every_s=300.0, run_s=300.0)

    def history(clone: Clone, clone_s: float) -> Summary:
        site = setting(*[32] * 10, policy="random", clone=clone, clone_s=clone_s)
        return Simulation(site).run(generate(bursts, SIZES, seed=1))

    instant, full = history("instant", 20.0), history("full", 50.0)
    assert 1.4 < instant.throughput_per_h / full.throughput_per_h < 1.6
    assert 1.4 < instant.utilisation / full.utilisation < 1.6


SWF = """\
; Version: 2.2
; Computer: none
1 0 5 60 4 -1 -1 4 100 -1 1 1 1 1 1 1 -1 -1
2 10 5 30 -1 -1 -1 20 100 1048576 1 1 1 1 1 1 -1 -1
3 20 -1 -1 4 -1 -1 4 100 -1 5 1 1 1 1 1 -1 -1   ; cancelled before it ran

4 30 5 0 1 -1 300000 1 100 -1 0 1 1 1 1 1 -1 -1
"""


def test_a_trace_says_when_how_long_and_how_wide_jobs_were() -> None:
    assert list(read_swf(SWF.splitlines(), SIZES)) == [
        Arrival(0.0, 60.0, Demand(cpus=4, memory_bytes=4 * GIB)),
        Arrival(10.0, 30.0, Demand(cpus=7, memory_bytes=-(-20 * GIB // 3), count=3)),
        Arrival(30.0, 0.0, Demand(cpus=1, memory_bytes=512 * 2**20)),
    ]


@pytest.mark.parametrize(
    "line",
    ["1 2 3", "1 0 5 sixty 4 -1 -1 4 100 -1 1 1 1 1 1 1 -1 -1", "1 nan 5 60 4 -1 -1 4 100 -1 1 1 1 1 1 1 -1 -1"],
)
def test_a_line_that_is_no_job_is_named_by_its_number(line: str) -> None:
    with pytest.raises(CarrelError, match=r"line 2: .* is no job of the Standard Workload Format"):
        list(read_swf(["; head", line], SIZES))


@settings(max_examples=40)
@given(st.integers(1, 500), st.integers(0, 10**12), st.integers(1, 64))
def test_a_wide_job_becomes_as_few_guests_as_hold_it(cpus: int, memory_bytes: int, most: int) -> None:
    demand = guests(cpus, memory_bytes, Sizes(cpus_max=most, memory_per_cpu_bytes=0))
    assert demand.cpus <= most
    assert demand.cpus * demand.count >= cpus
    assert demand.memory_bytes * demand.count >= memory_bytes
    assert (demand.count - 1) * most < cpus


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "jobs.swf.gz"
    with gzip.open(path, "wt") as file:
        file.write(SWF)
    return path


def carrel(*words: str) -> int:
    return main.run(["simulate", *words])


def test_a_trace_is_simulated_for_each_policy_and_kind_of_clone(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert carrel(f"--trace={trace}", "--hosts=2x8:32G", "--hosts=1x16:64G", "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["policy"], one["clone"]) for one in found] == [
        (policy, clone) for policy in POLICIES for clone in ("instant", "linked", "full")
    ]
    assert all((one["jobs"], one["done"]) == (3, 3) for one in found)


def test_a_table_compares_with_full_clones_and_a_plot_shows_each_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.svg"
    words = ("--policy=first", "--clone=instant=2", "--clone=full=5", "--jobs=200", "--hosts=4x8:32G", "--run=20")
    assert carrel(*words, f"--plot={plot}") == 0
    title, instant, full, *_ = capsys.readouterr().out.splitlines()
    assert title.split()[:3] == ["POLICY", "CLONE", "TAKES"]
    assert instant.split()[:4] == ["first", "instant", "2", "200"]
    assert full.split()[:4] == ["first", "full", "5", "10"]
    assert (full.split()[7], float(instant.split()[7].removesuffix("x")) > 1.5) == ("1.00x", True)
    root = ET.parse(plot).getroot()  # noqa: S314  # our own file
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2


def test_the_page_that_compares_policies_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs/explanation/placement.md"
    words = "--policy=best-fit --clone=instant=1 --cpus=1,2,4,16,32 --burst=36 --jobs=4000"
    assert carrel(*words.split()) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[:2]]
    shown = [line.split() for line in page.read_text().splitlines()]
    assert printed[0] in shown
    assert printed[1] in shown


def test_the_limits_are_those_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "carrel.toml"
    config.write_text("[placement.launches.rate]\nfull = 1\n")
    monkeypatch.setenv("CARREL_CONFIG", str(config))
    words = ("--policy=first", "--clone=full=1", "--jobs=5", "--burst=5", "--run=1", "--cpus=1", "--json")
    assert carrel(*words) == 0
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found["wait_s"]["p95"] == 4 * 60 + 1


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("--hosts=ten",), 2, "--hosts 'ten': give COUNTxCPUS:MEMORY, like 10x32:128G"),
        (("--clone=half",), 2, "--clone 'half': give instant, linked or full"),
        (("--clone=full=-1",), 2, "--clone 'full=-1'"),
        (("--burst=0",), 2, "--burst"),
        (("--failures=1",), 2, "--failures"),
        (("--clone=full=soon",), 2, "--clone 'full=soon'"),
        (("--cpus=1,x",), 2, "--cpus '1,x': give sizes of jobs like 1,2,4"),
        (("--cpu-overcommit=0",), 2, "overcommit of 0.0"),
        (("--trace=/no/such.swf",), 1, "/no/such.swf: No such file or directory"),
        (("--plot=/no/such/plot.svg", "--jobs=1"), 2, "/no/such/plot.svg: /no/such is no directory"),
        (("--plot=plot.png", "--jobs=1"), 2, "plot.png: only SVG is written; give a name that ends in .svg"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_a_sentence(
    words: tuple[str, ...], status: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert carrel(*words) == status
    assert sentence in capsys.readouterr().err


def test_a_trace_that_is_none_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.swf"
    path.write_text("; nothing\nhello\n")
    assert carrel(f"--trace={path}") == 1
    assert f"{path}: line 2: 'hello' is no job" in capsys.readouterr().err
    path.write_text("; nothing\n")
    assert carrel(f"--trace={path}") == 1
    assert f"{path}: no job in it ever ran" in capsys.readouterr().err
