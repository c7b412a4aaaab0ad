"""Grids of factors: sequences, splits by combination and by edge, strides, circles, and labelled pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from flowfactor.data.factors import FactorSequences


class Grid(FactorSequences):
    """Pictures whose F pixels are the states themselves, over 10."""

    def __init__(self, sizes: tuple[int, ...], vary: str, **settings) -> None:
        names = tuple("abcdefg"[: len(sizes)])
        values = [torch.linspace(0, 1, size, dtype=torch.float64) for size in sizes]
        self._lay_out(names, values, vary=tuple(vary), **settings)
        self.image_shape = (1, 1, len(sizes))

    def images_at(self, states: torch.Tensor) -> torch.Tensor:
        return (states / 10).unsqueeze(-2).unsqueeze(-2)


def reached(data: FactorSequences) -> set[tuple[int, ...]]:
    """All states that any frame of any sequence, or any labelled picture, can have."""
    everything = torch.arange(len(data))
    states = [data.states(everything, torch.full_like(everything, k)).flatten(0, 1) for k in range(data.num_flows)]
    return {tuple(row) for row in torch.cat([*states, data.scenes(everything)]).tolist()}


SPLITS = {
    "by combination": {"sizes": (4, 3, 5, 4), "vary": "ab", "steps": 2},
    "by edge, all moving": {"sizes": (4, 6, 5, 4), "vary": "abcd", "steps": 3},
    "by edge, with a circle": {"sizes": (8, 6, 5), "vary": "cab", "steps": 3, "cyclic": ("a",)},
    "by edge, few held": {"sizes": (3, 6, 6), "vary": "bc", "steps": 3},
    "by edge, with strides": {"sizes": (9, 6, 3), "vary": "abc", "steps": 2, "stride": {"a": 3, "b": 2}},
}


@pytest.mark.parametrize("name", SPLITS)
def test_no_frame_is_in_both_splits_and_each_moves_every_factor(name: str) -> None:
    train, test, every = (Grid(split=split, **SPLITS[name]) for split in ("train", "test", "all"))
    assert reached(train)
    assert reached(test)
    assert not reached(train) & reached(test)
    assert reached(train) | reached(test) == reached(every)
    assert reached(every) == set(itertools.product(*map(range, every.factor_sizes)))
    assert bool(train._edge) == name.startswith("by edge")
    assert {tuple(row) for row in train.scenes(torch.arange(len(train))).tolist()} == reached(train)
    assert len(train) == len(reached(train))
    assert len(test) == len(reached(test))


@pytest.mark.parametrize("split", ["train", "test", "all"])
@pytest.mark.parametrize("name", SPLITS)
def test_one_factor_moves_upwards_and_the_rest_hold(name: str, split: str) -> None:
    data = Grid(split=split, **SPLITS[name])
    strides = SPLITS[name].get("stride", {})
    for k, factor in enumerate(data.flow_names):
        states = data.states(torch.arange(len(data)), torch.full((len(data),), k))
        f = data.factor_names.index(factor)
        rest = [other for other in range(states.shape[-1]) if other != f]
        assert torch.equal(states[..., rest], states[:, :1, rest].expand(-1, states.shape[1], -1))
        moves = states[..., f].diff(dim=1)
        if factor in SPLITS[name].get("cyclic", ()):
            moves = moves % data.factor_sizes[f]
            assert len(set(states[:, 0, f].tolist())) == data.factor_sizes[f]
        assert bool((moves == strides.get(factor, 1)).all())
        assert all(len(set(row)) == len(row) for row in states[..., f].tolist())


def test_the_share_held_out() -> None:
    data = {split: Grid((8, 15, 4), "abc", steps=3, split=split) for split in ("train", "test", "all")}
    assert len(data["test"]) / len(data["all"]) == pytest.approx(0.2, abs=0.03)
    assert len(data["train"]) + len(data["test"]) == len(data["all"])
    half = Grid((8, 15, 4), "abc", steps=3, split="test", held_out=0.5)
    assert len(half) / len(data["all"]) == pytest.approx(0.5, abs=0.03)
    assert Grid((4, 8, 8), "bc", steps=2, split="test", edges=("c", "b"))._edge.keys() == {1, 2}


def test_several_factors_walk_together() -> None:
    data = Grid((5, 6, 3), "ab", steps=4, split="all", cyclic=("b",))
    moves = torch.tensor([[[1, 0], [1, 1], [0, 1], [0, 1]]]).expand(len(data), -1, -1)
    states = data.walk(torch.arange(len(data)), moves)
    start = states[:, 0]
    assert torch.equal(states[..., 0] - start[:, None, 0], torch.tensor([0, 1, 2, 2, 2]).expand(len(data), -1))
    assert torch.equal((states[..., 1] - start[:, None, 1]) % 6, torch.tensor([0, 0, 1, 2, 3]).expand(len(data), -1))
    assert set(start[:, 0].tolist()) == {0, 1, 2}
    assert set(start[:, 1].tolist()) == set(range(6))
    assert int(states[..., 0].max()) == 4


def test_labelled_pictures(generator: torch.Generator) -> None:
    data = Grid((4, 3, 5, 4), "ab", steps=2, split="test")
    images, labels = data.factor_samples(400, generator)
    assert images.shape == (400, 1, 1, 4)
    assert labels.shape == (400, 4)
    assert labels.dtype == torch.int64
    torch.testing.assert_close(images[:, 0, 0], labels / 10)
    assert {tuple(row) for row in labels.tolist()} <= reached(data)
    assert set(labels[:, 0].tolist()) == {0, 1, 2, 3}
    again, _ = data.factor_samples(400, torch.Generator().manual_seed(0))
    assert torch.equal(again, images)
    _, few = data.subset([3, 5]).factor_samples(50)
    assert {tuple(row) for row in few.tolist()} == {tuple(row) for row in data.scenes(torch.tensor([3, 5])).tolist()}
    for n, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="n must be"):
            data.factor_samples(n)


def test_items_and_epochs() -> None:
    data = Grid((4, 3, 5), "ba", steps=2, split="train")
    item = data[7, 1]
    assert set(item) == {"frames", "k", "t", "factors"}
    assert item["frames"].shape == (3, 1, 1, 3)
    torch.testing.assert_close(item["factors"][:, 0], torch.linspace(0, 1, 4)[:3] + item["factors"][0, 0])
    assert [batch["k"].tolist() for batch in data.batches(4)] == [[0, 0, 1, 1]] * (len(data) // 4)


def test_the_hash_is_the_documented_one() -> None:
    """The split of a published benchmark must not change: the hash is Knuth's, twice, in 64 bits."""
    from flowfactor.data.factors import _hash

    def by_hand(value: int) -> int:
        for _ in range(2):
            value = (value + 1) * 0x9E3779B97F4A7C15 % 2**64
            value ^= value >> 29
        return value

    assert _hash(np.arange(50)).tolist() == [by_hand(value) for value in range(50)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "'train', 'test' or 'all'"),
        ({"vary": "x"}, "vary must be distinct names out of a, b, c"),
        ({"steps": 4}, "a has 4 states, but a sequence of 4 steps runs over 5"),
        ({"stride": 2}, "a has 4 states, but a sequence of 2 steps runs over 5"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"stride": {"z": 2}}, "stride names z, but the factors are a, b, c"),
        ({"held_out": 0}, "share between 0 and 1"),
        ({"sizes": (3, 3), "vary": "ab"}, "use split='all'"),
        ({"sizes": (4, 4), "vary": "ab", "cyclic": ("a",)}, "use split='all'"),
        ({"t": [0, 1]}, "t must be 3 strictly increasing times"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**{"sizes": (4, 3, 5), "vary": "a", "steps": 2, "split": "test", **arguments})
