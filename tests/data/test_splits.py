"""Training and test sequences: every class on both sides, every film on one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from film_files import noise, write_array, write_pictures

from flowfactor.data import Sequences
from flowfactor.data.splits import draw, join_groups, split_groups


@pytest.mark.parametrize("seed", range(60))
def test_each_class_is_on_both_sides_and_each_group_on_one_or_it_is_refused(seed: int) -> None:
    random = np.random.default_rng(seed)
    classes, films = int(random.integers(1, 6)), int(random.integers(2, 40))
    mixed = bool(seed % 2)  # films with windows of several classes
    own = random.integers(0, classes, films)
    labels, groups = [], []
    for film in range(films):
        for _ in range(int(random.integers(1, 12))):
            labels.append(int(random.integers(0, classes)) if mixed else int(own[film]))
            groups.append(f"film{film}")
    order = random.permutation(len(labels))
    labels, groups = [labels[n] for n in order], [groups[n] for n in order]
    alone = [
        label for label in set(labels) if len({g for g, one in zip(groups, labels, strict=True) if one == label}) < 2
    ]
    fraction = float(random.uniform(0.05, 0.5))
    try:
        chosen = split_groups(labels, groups, fraction, seed)
    except ValueError as error:
        assert (alone and "no test split can be taken" in str(error)) or (mixed and "no division" in str(error))
        return
    assert not alone
    sides = [{g for g, held in zip(groups, chosen, strict=True) if held is side} for side in (True, False)]
    assert not sides[0] & sides[1]
    for side in (True, False):
        assert {one for one, held in zip(labels, chosen, strict=True) if held is side} == set(labels)


def test_shares_are_as_even_as_whole_groups_allow() -> None:
    labels = [n % 4 for n in range(400)]
    chosen = split_groups(labels, [str(n) for n in range(400)], 0.1, 3)
    assert Counter(label for label, held in zip(labels, chosen, strict=True) if held) == dict.fromkeys(range(4), 10)


def test_a_split_depends_on_the_seed_and_the_names_alone() -> None:
    labels, groups = [0] * 30 + [1] * 30, [f"film{n}" for n in range(60)]
    chosen = {g for g, held in zip(groups, split_groups(labels, groups), strict=True) if held}
    back = {g for g, held in zip(groups[::-1], split_groups(labels[::-1], groups[::-1]), strict=True) if held}
    assert chosen == back
    assert chosen != {g for g, held in zip(groups, split_groups(labels, groups, seed=1), strict=True) if held}


@pytest.mark.parametrize("seed", range(12))
def test_windows_of_one_film_are_never_on_both_sides(tmp_path: Path, seed: int) -> None:
    random, numbers = np.random.default_rng(seed), {}
    for label in ("left", "right"):
        for film in range(int(random.integers(2, 7))):
            length = int(random.integers(4, 20))
            # The first column numbers the film, so that frames tell where they come from.
            frames = noise(length, seed * 100 + film, (4, 6))
            frames[:, :, 0] = len(numbers)
            numbers[f"{label}/{film}.npy"] = len(numbers)
            write_array(tmp_path / label / f"{film}.npy", frames)
    data = Sequences(tmp_path, window=4, stride=int(random.integers(1, 5)))
    train, test = data.split(0.3, seed)
    films = [set(part.frames[:, :, 0, :, 0].unique().tolist()) for part in (train, test)]
    assert not films[0] & films[1] and films[0] | films[1] == set(range(len(numbers)))
    assert set(train.fixed_k.tolist()) == set(test.fixed_k.tolist()) == {0, 1}
    assert len(train) + len(test) == len(data)


@pytest.mark.parametrize("classes", [True, False])
def test_windows_that_a_user_cut_into_folders_stay_together(tmp_path: Path, classes: bool) -> None:
    """Overlapping windows, each a folder of its own: frames in common tell that they are of one film."""
    for film in range(4):
        frames = noise(12, film)
        frames[0] = 0  # a blank frame, which all films begin with, tells nothing
        for window in range(5):
            label = f"{'ab'[film % 2]}/" if classes else ""
            write_pictures(tmp_path / f"{label}clip{film * 5 + window}", frames[2 * window : 2 * window + 4])
    data = Sequences(tmp_path)
    for seed in range(8):
        train, test = data.split(0.2, seed)
        seen = {frame for own in train.frame_digests() for frame in own}
        assert not any(frame in seen for own in test.frame_digests() for frame in own)
        assert len(train) + len(test) == 20 and set(train.fixed_k.tolist()) == set(test.fixed_k.tolist())
    assert len(Sequences(tmp_path, group=r"clip\d+").split(0.2)[1]) == 4  # who says what belongs together is believed


def test_what_cannot_be_split_is_refused_with_numbers(tmp_path: Path) -> None:
    write_array(tmp_path / "left" / "a.npy", noise(12, 0))
    write_array(tmp_path / "left" / "b.npy", noise(12, 1))
    write_array(tmp_path / "right" / "a.npy", noise(12, 2))
    data = Sequences(tmp_path, window=3)
    with pytest.raises(ValueError, match=r"class 'right': 4 sequences of 1 film\. .*add films.*data\.test_root"):
        data.split()
    with pytest.raises(ValueError, match=r"the data: 4 sequences of 1 film"):
        Sequences(noise(12)[None], window=3).split()
    write_array(tmp_path / "right" / "b.npy", noise(12, 2)[6:])
    with pytest.raises(
        ValueError, match=r"class 'right'.* Of 4 films some have frames in common .*data\.options\.group"
    ):
        Sequences(tmp_path, window=3).split()
    for share in (0, 1, 1.5, "half", True):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            data.split(share)  # type: ignore[arg-type]


def test_groups_that_span_classes_in_a_knot_are_refused() -> None:
    # Two films with both classes can be parted; where one holds all of a class but one, they cannot.
    assert split_groups([0, 1, 0, 1], ["a", "a", "b", "b"]) in ([True, True, False, False], [False, False, True, True])
    with pytest.raises(ValueError, match="no division of them"):
        split_groups([0, 0, 1, 1, 2, 2], ["a", "b", "b", "c", "c", "a"])


def test_groups_are_joined_along_chains() -> None:
    assert join_groups(["a", "b", "c", "d"], [[b"1"], [b"2", b"3"], [b"3", b"1"], [b"4"]]) == ["a", "a", "a", "d"]


def test_a_draw_takes_some_of_every_label_at_random() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    for limit, shares in ((9, [3, 3, 3]), (21, [9, 9, 3]), (3, [1, 1, 1]), (64, [31, 30, 3])):
        chosen = draw(83, limit, labels, seed=5)
        assert labels[chosen].bincount().tolist() == shares and chosen.tolist() == sorted(set(chosen.tolist()))
    assert draw(83, 9, labels, 1).tolist() == draw(83, 9, labels, 1).tolist() != draw(83, 9, labels, 2).tolist()
    assert draw(83, 100, labels).tolist() == list(range(83))
    assert draw(1000, 100).float().mean() == pytest.approx(500, abs=120)
    with pytest.raises(ValueError, match="at least 3, one of every transformation"):
        draw(83, 2, labels)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        draw(83, 0)
