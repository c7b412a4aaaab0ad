"""What sequences have beside frames: own times, masks of what was observed, contexts."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import flowfactor as ff
from flowfactor.data import Sequences

N, T = 6, 4


@pytest.fixture
def frames(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(N, T + 1, 1, 4, 4, generator=generator)


def own_times() -> torch.Tensor:
    return torch.arange(T + 1.0) * torch.linspace(0.5, 2, N)[:, None]


def holes() -> torch.Tensor:
    mask = torch.ones(N, T + 1, dtype=torch.bool)
    mask[1, 2] = mask[4, 3:] = False
    return mask


def whole(frames: torch.Tensor, **options) -> Sequences:
    context = {"pose": torch.arange(2.0 * N).view(N, 2), "speed": torch.arange(float(N))[:, None]}
    options = {"k": [0, 1] * (N // 2), "t": own_times(), "mask": holes(), "context": context} | options
    return Sequences(frames, **options)


def test_a_batch_has_them_by_name(frames: torch.Tensor) -> None:
    data = whole(frames)
    batch = data.batch([4, 1])
    assert list(batch) == ["frames", "k", "t", "mask", "context"]
    expected = own_times()[[4, 1]]
    expected[0, 3:] = expected[0, 2]  # after the last frame that was observed nothing is looked at
    torch.testing.assert_close(batch["t"], expected)
    assert torch.equal(batch["mask"], holes()[[4, 1]])
    assert batch["context"]["pose"].tolist() == [[8, 9], [2, 3]]
    assert batch["context"]["speed"].tolist() == [[4], [1]]
    assert data.context_size == {"pose": 2, "speed": 1}
    item = data[1]
    assert (item["t"].shape, item["mask"].tolist()) == ((T + 1,), [True, True, False, True, True])
    assert item["context"]["pose"].tolist() == [2, 3]
    torch.testing.assert_close(data.t, torch.stack([data[i]["t"] for i in range(N)]).mean(0))


def test_without_them_a_batch_is_as_ever(frames: torch.Tensor) -> None:
    data = Sequences(frames)
    assert list(data.batch([0])) == ["frames", "k", "t"]
    assert data.context_size == 0
    assert data.batch([0])["t"].tolist() == [0, 1, 2, 3, 4]


def test_they_keep_the_contract_of_data_sets(frames: torch.Tensor) -> None:
    ff.testing.check_dataset(whole(frames))
    ff.testing.check_dataset(Sequences(frames, context=torch.rand(N, 3)))
    ff.testing.check_dataset(Sequences([*frames[:3], *frames[:3, :3]], pad=True))
    ff.testing.check_dataset(whole(frames, window=3, stride=1))


def test_they_stay_with_their_sequence(frames: torch.Tensor) -> None:
    """Shuffled, split, taken in part and loaded by workers: each sequence is told by its first pixel."""
    marked = frames.clone()
    marked[:, :, 0, 0, 0] = torch.arange(N)[:, None] / N
    data = whole(marked)
    owners = dict(enumerate(data.batch(range(N))["context"]["speed"].flatten().tolist()))
    train, test = data.split(0.4, seed=1)
    loaders = [
        data.batches(4, generator=torch.Generator().manual_seed(1)),
        data.loader(2).dataloader(num_workers=0),
        train.batches(2),
        test.batches(1, stratified=False),
        DataLoader(data, batch_size=3, shuffle=True),
        data.subset([5, 2, 4]).batches(2, stratified=False),
    ]
    seen = 0
    for batch in itertools.chain(*loaders):
        for row, pixel in enumerate(batch["frames"][:, 0, 0, 0, 0].tolist()):
            n = round(N * pixel)
            assert batch["context"]["speed"][row].item() == owners[n]
            assert torch.equal(batch["t"][row], data[n]["t"])
            assert torch.equal(batch["mask"][row], holes()[n])
            seen += 1
    assert seen > 3 * N


def test_windows_count_their_own_times(frames: torch.Tensor) -> None:
    data = whole(frames, window=3, stride=1)
    # Of 3 windows each, one of film 1 begins with the frame that is missing; those of film 4 end where nothing is seen.
    assert len(data) == 3 * N - 1 - 1
    batch = data.batch(range(len(data)))
    assert bool((batch["t"][:, 0] == 0).all())
    assert bool(batch["mask"][:, 0].all())
    torch.testing.assert_close(batch["t"][1], own_times()[0, 1:4] - own_times()[0, 1])
    assert batch["context"]["speed"][:4].flatten().tolist() == [0, 0, 0, 1]
    whole_films = Sequences(frames, t=[0, 1, 3, 6, 10.0], window=3, stride=2)
    assert whole_films.batch([0, 1])["t"].tolist() == [[0, 1, 3], [0, 3, 7]]


@pytest.mark.parametrize("own", [False, True])
def test_recordings_of_different_lengths(frames: torch.Tensor, own: bool) -> None:
    parts = [frames[0], frames[1, :2], frames[2, :4]]
    t = [[0, 1, 2, 3, 4.5], [1, 4], [0, 1, 1, 2]] if own else None
    data = Sequences(parts, t=t, pad=True)
    batch = data.batch([0, 1, 2])
    assert batch["mask"].sum(1).tolist() == [5, 2, 4]
    assert torch.equal(batch["mask"], torch.arange(5) < torch.tensor([[5], [2], [4]]))
    torch.testing.assert_close(batch["frames"][1], frames[1, [0, 1, 1, 1, 1]])
    assert batch["t"].tolist() == ([[0, 1, 2, 3, 4.5], [1, 4, 4, 4, 4], [0, 1, 1, 2, 2]] if own else [0, 1, 2, 3, 4])
    part = data.subset([2, 1])
    torch.testing.assert_close(part.batch([0, 1])["frames"], batch["frames"][[2, 1]])
    assert part.batch([1])["mask"].sum() == 2
    with pytest.raises(ValueError, match="all sequences must be equally long"):
        Sequences(parts)
    with pytest.raises(ValueError, match=r"window=3 .* pad=True .*: give either"):
        Sequences(parts, pad=True, window=3)


def test_missing_frames_may_hold_anything(frames: torch.Tensor) -> None:
    broken = frames.masked_fill(~holes()[:, :, None, None, None], torch.nan)
    data = Sequences(broken, mask=holes().int())
    assert bool(data.frames.isfinite().all())
    torch.testing.assert_close(data.frames[holes()], frames[holes()])
    with pytest.raises(ValueError, match="frames hold NaN"):
        Sequences(broken)
    late = own_times()
    late[4, 3:] = torch.nan
    assert bool(Sequences(broken, t=late, mask=holes()).batch([4])["t"].isfinite().all())


def test_moving_and_telling_apart(frames: torch.Tensor) -> None:
    data = whole(frames)
    moved = data.to("cpu")
    assert torch.equal(moved.batch([3])["context"]["pose"], data.batch([3])["context"]["pose"])
    marks = [data.fingerprint()["sha256"]]
    late, seen = own_times(), holes()
    late[2, 4] += 1
    seen[3, 1] = False
    context = {"pose": torch.zeros(N, 2), "speed": torch.ones(N, 1)}
    others = [whole(frames, t=late), whole(frames, mask=seen), whole(frames, context=context)]
    marks += [other.fingerprint()["sha256"] for other in others]
    assert len(set(marks)) == 4


def save(path: Path, **arrays: np.ndarray) -> None:
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
        return
    h5py = pytest.importorskip("h5py", reason="needs the extra data")
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


@pytest.mark.parametrize("ending", [".npz", ".h5"])
def test_files_hold_them_by_name(tmp_path: Path, frames: torch.Tensor, ending: str) -> None:
    arrays = {"frames": frames.numpy(), "k": np.arange(N) % 2, "t": own_times().numpy(), "mask": holes().numpy()}
    path = tmp_path / f"films{ending}"
    save(path, **arrays, **{"context/pose": np.ones((N, 2)), "context/speed": np.arange(N)[:, None]})
    data = Sequences(path)
    assert (data.num_flows, data.context_size) == (2, {"pose": 2, "speed": 1})
    whole_again = whole(frames, context={"pose": torch.ones(N, 2), "speed": torch.arange(N)[:, None]})
    assert data.fingerprint() == whole_again.fingerprint()
    save(path, **arrays, context=np.ones((N, 3)))
    assert Sequences(path).context_size == 3
    assert (
        Sequences(path, context=torch.zeros(N, 1)).context_size == 1
    )  # what is given comes before what the file holds


@pytest.mark.parametrize("ending", [".npz", ".h5"])
def test_films_of_a_folder_hold_their_own(tmp_path: Path, frames: torch.Tensor, ending: str) -> None:
    for n in range(3):
        beside = {
            "t": own_times()[n].numpy()[: T - n],
            "mask": holes().numpy()[n, : T - n],
            "context": np.array([n, 1.0]),
        }
        save(tmp_path / f"film{n}{ending}", frames=frames.numpy()[n, : T - n], **beside)
    data = Sequences(tmp_path, pad=True)
    batch = data.batch([0, 1, 2])
    torch.testing.assert_close(batch["t"][0], own_times()[0, :T])
    torch.testing.assert_close(batch["t"][2], own_times()[2, [0, 1, 1, 1]])
    assert batch["mask"].tolist() == [[True] * 4, [True, True, False, False], [True, True, False, False]]
    assert batch["context"].tolist() == [[0, 1], [1, 1], [2, 1]]
    save(tmp_path / f"film3{ending}", frames=frames.numpy()[3], t=np.arange(T + 1.0), mask=np.ones(T + 1))
    with pytest.raises(ValueError, match=rf"film3{ending} holds no 'context', but .*film0{ending} does"):
        Sequences(tmp_path, pad=True)
    save(
        tmp_path / f"film3{ending}",
        frames=frames.numpy()[3],
        t=-np.arange(T + 1.0),
        mask=np.ones(T + 1),
        context=[0, 1],
    )
    with pytest.raises(ValueError, match=rf"film3{ending}: t must be finite and must not decrease"):
        Sequences(tmp_path, pad=True)


def test_a_file_of_one_film(tmp_path: Path, frames: torch.Tensor) -> None:
    save(
        tmp_path / "film.npz",
        frames=frames.numpy()[0, :, 0],
        t=np.array([0, 1, 3, 4, 9.0]),
        context=np.array([1.0, 2.0]),
    )
    data = Sequences(tmp_path / "film.npz", window=2, stride=1)
    assert data.batch([0, 1, 3])["t"].tolist() == [[0, 1], [0, 2], [0, 5]]
    assert data.batch([3])["context"].tolist() == [[1, 2]]


NAN = float("nan")


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ({"t": own_times()[:3]}, r"t must have a row for each of the 6 sequences, got \[3, 5\]"),
        ({"t": own_times()[:, :3]}, r"sequence 0: t has shape \[3\], but there are 5 frames"),
        ({"t": -own_times()}, "sequence 0: t must be finite and must not decrease"),
        ({"t": own_times().masked_fill(torch.arange(5) == 2, NAN)}, "sequence 0: t must be finite"),
        ({"mask": 2 * holes()}, "sequence 0: mask must hold booleans"),
        ({"mask": holes()[:, 1:]}, r"sequence 0: mask has shape \[4\], but there are 5 frames"),
        ({"mask": holes().flip(1)}, "sequence 4: mask says that the first frame was not observed"),
        ({"context": torch.ones(5, 2)}, r"row of features for each of the 6 sequences, shape \[6, C\]; got \[5, 2\]"),
        ({"context": torch.ones(6)}, r"got \[6\]; give one feature each as \[N, 1\]"),
        ({"context": torch.arange(6.0)[:, None].log()}, "sequence 0: context holds NaN or infinity"),
        ({"context": {"pose": torch.full((6, 1), NAN)}}, r"sequence 0: context\['pose'\] holds NaN"),
        ({"context": {}}, "names no features"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, frames: torch.Tensor, beside: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Sequences(frames, **beside)
    if "context" not in beside or not isinstance(beside["context"], dict):  # the same in a file, which is named
        save(tmp_path / "films.npz", frames=frames.numpy(), **{name: value.numpy() for name, value in beside.items()})
        with pytest.raises(ValueError, match=told.replace("sequence ", r"films.npz\[").replace(": ", r"\]: ", 1)
                           if told.startswith("sequence") else told):  # fmt: skip
            Sequences(tmp_path / "films.npz")


def test_what_holds_no_numbers_is_refused(frames: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="context must hold numbers"):
        Sequences(frames, context=[["a"]] * N)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="begins with one that was observed"):
        Sequences(frames, mask=torch.arange(T + 1).eq(0).expand(N, -1), window=2, stride=1)
