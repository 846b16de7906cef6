"""Slurm's short form of node names."""

import pytest

from carrel.slurm.hostlist import expand


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("(null)", ()),
        ("c1", ("c1",)),
        ("c1,login", ("c1", "login")),
        ("c[1-3]", ("c1", "c2", "c3")),
        ("c[08-10]", ("c08", "c09", "c10")),
        ("c[1,3-4]-ib", ("c1-ib", "c3-ib", "c4-ib")),
        ("r[1-2]c[1-2]", ("r1c1", "r1c2", "r2c1", "r2c2")),
        ("a[1-2],b,c[5]", ("a1", "a2", "b", "c5")),
    ],
)
def test_a_list_is_written_out_in_slurms_order(text: str, names: tuple[str, ...]) -> None:
    assert expand(text) == names


def test_a_range_of_billions_does_not_fill_the_memory() -> None:
    assert len(expand("c[1-4000000000]")) <= 65537
