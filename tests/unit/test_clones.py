"""Which clone a guest becomes: every wish, every site, with and without a template."""

import pytest

from carrel.core.clones import Choice, base_memory, choose, fits, growth, ports, ways_in
from carrel.errors import RefusedError

MIB = 2**20
SHAPE = "debian12, 1 CPU and from 256 MiB"


@pytest.mark.parametrize("share", ["all", "user"])
@pytest.mark.parametrize("wish", ["auto", "instant"])
def test_a_guest_comes_from_a_template_where_there_is_one(wish: str, share: str) -> None:
    chosen = choose(wish, share=share, has_template=True, shape=SHAPE)  # type: ignore[arg-type]
    assert chosen == Choice(clone="instant", why=f"from a template for {SHAPE}")


@pytest.mark.parametrize("wish", ["auto", "instant"])
def test_the_first_guest_of_a_shape_boots_and_has_a_template_made_for_the_next(wish: str) -> None:
    chosen = choose(wish, share="all", has_template=False, shape=SHAPE)  # type: ignore[arg-type]
    assert (chosen.clone, chosen.make_template) == ("linked", True)
    assert chosen.why == f"the first for {SHAPE}: a template is made for the next"


def test_what_failed_lately_is_not_tried_again_for_each_guest() -> None:
    chosen = choose("auto", share="all", has_template=False, failure="disk full", shape=SHAPE)
    assert chosen == Choice(clone="linked", why=f"no template for {SHAPE}: disk full")


def test_a_template_that_is_there_is_used_whatever_failed_before() -> None:
    assert choose("auto", share="all", has_template=True, failure="disk full", shape=SHAPE).clone == "instant"


def test_a_guest_boots_where_its_template_was_of_no_use_says_so_and_has_it_made_anew() -> None:
    chosen = choose("instant", share="all", has_template=True, failure="x", broken="its ram is gone", shape=SHAPE)
    assert (chosen.clone, chosen.make_template) == ("linked", True)
    assert chosen.why == f"the template for {SHAPE} was of no use and is made anew: its ram is gone"


def test_a_template_that_was_too_slow_for_one_job_alone_is_not_made_anew() -> None:
    chosen = choose("auto", share="all", has_template=True, broken="no word", is_spoilt=False, shape=SHAPE)
    assert (chosen.clone, chosen.make_template) == ("linked", False)
    assert chosen.why == f"the template for {SHAPE} was of no use: no word"


@pytest.mark.parametrize("wish", ["auto", "instant"])
def test_a_guest_so_large_that_a_boot_is_quicker_boots_and_no_template_is_made_for_it(wish: str) -> None:
    chosen = choose(wish, share="all", has_template=False, fits=False, shape=SHAPE)  # type: ignore[arg-type]
    assert (chosen.clone, chosen.make_template) == ("linked", False)
    assert "guests.templates.base_max_bytes" in chosen.why


def test_what_is_plugged_in_is_at_most_eight_times_what_is_there() -> None:
    assert fits(9 * 256 * MIB, 256 * MIB)
    assert not fits(9 * 256 * MIB + 4 * MIB, 256 * MIB)


@pytest.mark.parametrize("wish", ["linked", "full"])
@pytest.mark.parametrize("share", ["all", "none"])
def test_whoever_asks_for_a_boot_gets_it_and_no_template_is_made(wish: str, share: str) -> None:
    chosen = choose(wish, share=share, has_template=True, shape=SHAPE)  # type: ignore[arg-type]
    assert chosen == Choice(clone=wish, why="as asked for")  # type: ignore[arg-type]


def test_a_site_without_shared_memory_has_no_instant_clones_and_refuses_one_asked_for_by_name() -> None:
    chosen = choose("auto", share="none", has_template=True, shape=SHAPE)
    assert (chosen.clone, chosen.make_template) == ("linked", False)
    assert "guests.templates.share = none" in chosen.why
    with pytest.raises(RefusedError, match=r"--guest-clone=instant: .*guests\.templates\.share = none.*=linked"):
        choose("instant", share="none", has_template=True, shape=SHAPE)


@pytest.mark.parametrize("memory_mib", [160, 161, 255, 256, 257, 511, 512, 4095, 4096, 100_000])
@pytest.mark.parametrize("most_mib", [160, 256, 1000, 4096])
def test_a_template_fits_in_its_guest_and_leaves_at_most_half_of_it_to_be_plugged_in(
    memory_mib: int, most_mib: int
) -> None:
    base = base_memory(memory_mib * MIB, least_bytes=160 * MIB, most_bytes=most_mib * MIB)
    assert 160 * MIB <= base <= memory_mib * MIB
    assert base <= max(160, most_mib) * MIB
    assert base * 2 > min(memory_mib, most_mib) * MIB


@pytest.mark.parametrize(
    ("memory_mib", "most_mib", "base_mib"),
    [
        (255, 4096, 160),
        (256, 4096, 256),
        (511, 4096, 256),
        (512, 4096, 512),
        (100_000, 4096, 4096),
        (4096, 256, 256),
        (4096, 255, 160),
    ],
)
def test_a_template_is_of_the_largest_of_a_few_sizes(memory_mib: int, most_mib: int, base_mib: int) -> None:
    base = base_memory(memory_mib * MIB, least_bytes=160 * MIB, most_bytes=most_mib * MIB)
    assert base == base_mib * MIB


def test_what_is_plugged_in_are_whole_steps_of_four_mebibytes() -> None:
    assert [growth(mib * MIB, 256 * MIB) // MIB for mib in (100, 256, 259, 260, 264, 275)] == [0, 0, 0, 4, 8, 16]


@pytest.mark.parametrize("cpus", [1, 2, 64])
@pytest.mark.parametrize("base_mib", [160, 256, 512, 1024, 2048, 4096])
def test_tasks_on_all_ports_of_a_guest_leave_half_of_its_memory_unless_its_cpus_need_more(
    base_mib: int, cpus: int
) -> None:
    has = ports(base_mib * MIB, cpus=cpus, most=511)
    assert ways_in(has) >= 2 * cpus
    # Under QEMU 10 an open port takes 4 MiB.
    assert has * 4 <= base_mib / 2 or ways_in(has) == 2 * cpus


def test_no_guest_has_more_ports_than_the_site_and_the_device_allow() -> None:
    assert ports(2**40, cpus=1, most=511) == ports(2**40, cpus=1000, most=511) == 511
    assert ports(160 * MIB, cpus=8, most=10) == 10


def test_a_guest_is_never_given_more_than_it_was_promised_and_less_by_one_step_at_most() -> None:
    for memory_mib in (160, 161, 163, 164, 240, 255):
        has = 160 * MIB + growth(memory_mib * MIB, 160 * MIB)
        assert 0 <= memory_mib * MIB - has < 4 * MIB
