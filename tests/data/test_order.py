"""The order of names."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from flowfactor.data.order import natural_key, natural_order


@pytest.mark.parametrize(
    "names",
    [
        ["frame2.png", "frame9.png", "frame10.png"],
        ["t0.125.png", "t0.25.png", "t0.5.png", "t1.png"],
        ["t0.125", "t0.25", "t0.5", "t1"],  # folders: what stands after the point is no ending
        ["rot_-20.png", "rot_-10.png", "rot_0.png", "rot_+5.png", "rot_10.png"],
        ["-1.5", "-0.5", "0.5", "2"],
        ["x=-2", "x=-1", "x=3"],
        ["f-1", "f-2", "f-10"],
        ["2023-12-31", "2024-01-05", "2024-02-01"],
        ["2023.12.31", "2024.01.05", "2024.01.10"],
        ["v1.2.3", "v1.2.10", "v1.9", "v1.10"],
        ["take1.1", "take1.2", "take1.10"],  # 1.1 and 1.10 are one number, so the points separate
        ["dt1e-3", "dt1e-2", "dt1"],
        ["s1e9", "s1e10", "s2e1"],
        ["run3-4_a", "run3-10_a"],
        ["img01.png", "img1.png", "img2.png"],
    ],
)
def test_names_are_sorted_as_people_do(names: list[str]) -> None:
    for seed in range(5):
        mixed = random.Random(seed).sample(names, len(names))
        assert [path.name for path in natural_order(map(Path, mixed))] == names


def test_keys_of_any_names_can_be_compared() -> None:
    names = [
        "",
        "a",
        "1",
        "-1",
        "a-1",
        "a_-1",
        "1.5.2",
        "v1.5",
        "²",
        "٣",
        "a.b",
        ".5",
        "5.",
        "1e-5",
        "e-5",
        "--2",
        "\u22123",
    ]
    keys = [natural_key(Path(name)) for name in names]
    assert len(sorted(keys)) == len(names)
