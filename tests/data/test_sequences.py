"""Sequences from arrays and folders, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowfactor.data import Sequences


@pytest.fixture
def frames(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(6, 4, 3, 5, 7, generator=generator)


def write(folder: Path, frames: np.ndarray, names: list[str] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for step, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / (names[step] if names else f"frame{step}.png"))


def pictures(count: int, seed: int = 0, shape: tuple[int, ...] = (5, 7)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def test_arrays_of_every_kind(frames: torch.Tensor) -> None:
    data = Sequences(frames)
    assert (len(data), data.num_steps, data.image_shape) == (6, 3, (3, 5, 7))
    for source in (frames.numpy(), list(frames), [part.numpy() for part in frames], frames.double()):
        torch.testing.assert_close(Sequences(source).batch([4, 2])["frames"], frames[[4, 2]])
    grey = Sequences((frames[:, :, 0] * 255).to(torch.uint8))
    assert grey.image_shape == (1, 5, 7)
    torch.testing.assert_close(grey[3]["frames"][:, 0], frames[3, :, 0], atol=1 / 255, rtol=0)
    assert Sequences([part[:, 0] for part in frames]).image_shape == (1, 5, 7)


def test_read_only_arrays(frames: torch.Tensor) -> None:
    array = frames.numpy().copy()
    array.flags.writeable = False
    assert torch.equal(Sequences(array).frames, frames)


def test_without_labels(frames: torch.Tensor) -> None:
    data = Sequences(frames)
    assert data.num_flows == 0
    assert data[0]["k"] == -1
    assert [batch["k"].tolist() for batch in data.batches(3)] == [[-1] * 3] * 2


def test_labels_times_and_names(frames: torch.Tensor) -> None:
    data = Sequences(frames, k=np.array([1, 0, 1, 0, 1, 0]), t=[0.0, 0.5, 2.0, 3.0], flow_names=["left", "right"])
    assert data.num_flows == 2
    assert data[2]["k"] == 1
    assert data[2]["t"].tolist() == [0.0, 0.5, 2.0, 3.0]
    assert data.batch([0, 1, 2])["k"].tolist() == [1, 0, 1]
    assert data.batch([0, 2], 1)["k"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="contradicts the labels"):
        data.batch([0, 1], 1)
    assert data.subset([1, 3])[1]["k"] == 0
    torch.testing.assert_close(data.subset([1, 3])[1]["frames"], frames[3])


def test_stratified_epochs_of_labelled_sequences() -> None:
    labels = torch.tensor([0] * 9 + [1] * 5)
    numbers = (torch.arange(14) / 14)[:, None, None, None].expand(14, 2, 3, 3)
    data = Sequences(numbers, k=labels)
    batches = list(data.batches(4, generator=torch.Generator().manual_seed(0)))
    assert [batch["k"].tolist() for batch in batches] == [[0, 0, 1, 1]] * 2
    drawn = torch.cat([batch["frames"][:, 0, 0, 0, 0] for batch in batches]).mul(14).round().int().tolist()
    assert len(set(drawn)) == 8
    assert all((n >= 9) == (k == 1) for n, k in zip(drawn, [0, 0, 1, 1] * 2, strict=True))
    plain = list(data.batches(7, stratified=False, shuffle=False))
    assert [batch["k"].tolist() for batch in plain] == [[0] * 7, [0, 0, 1, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match=r"\[9, 5\] sequences do not fill one stratified batch of 12"):
        data.batches(12)


def test_a_folder_of_sequences_in_natural_order(tmp_path: Path) -> None:
    first, second = pictures(11, 1), pictures(11, 2)
    write(tmp_path / "clip10", second)
    write(tmp_path / "clip9", first)  # frame10.png comes after frame9.png, clip10 after clip9
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "clip9" / "notes.txt").write_text("not a picture")
    data = Sequences(tmp_path)
    assert (len(data), data.num_steps, data.image_shape, data.num_flows) == (2, 10, (1, 5, 7), 0)
    assert torch.equal(data.frames[:, :, 0], torch.tensor(np.stack([first, second])))
    listed = Sequences([tmp_path / "clip10", str(tmp_path / "clip9")], k=[0, 1])
    assert torch.equal(listed.frames[:, :, 0], torch.tensor(np.stack([second, first])))


def test_folders_of_classes(tmp_path: Path) -> None:
    for n, (name, clip) in enumerate([("left", "a"), ("left", "b"), ("right", "a")]):
        write(tmp_path / name / clip, pictures(3, n, (5, 7, 3)))
    data = Sequences(tmp_path)
    assert data.flow_names == ("left", "right")
    assert [data[n]["k"] for n in range(3)] == [0, 0, 1]
    assert data.image_shape == (3, 5, 7)
    torch.testing.assert_close(
        data[2]["frames"], torch.tensor(pictures(3, 2, (5, 7, 3))).permute(0, 3, 1, 2) / 255, atol=1e-6, rtol=0
    )


def test_jpegs_and_mixed_modes(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 16 * 16, dtype=np.uint8).reshape(16, 16)
    write(tmp_path / "a", np.stack([smooth, smooth]), ["0.jpg", "1.JPEG"])
    assert Sequences(tmp_path).image_shape == (1, 16, 16)
    assert (Sequences(tmp_path).frames[0, 0, 0].int() - torch.tensor(smooth).int()).abs().max() < 20
    write(tmp_path / "b", np.stack([smooth] * 3, -1)[None].repeat(2, 0))
    data = Sequences(tmp_path)  # one coloured sequence makes all of them coloured
    assert data.image_shape == (3, 16, 16)
    assert torch.equal(data.frames[1, 0], torch.tensor(smooth).expand(3, 16, 16))


def nothing(root: Path) -> None:
    pass


def frames_in_the_root(root: Path) -> None:
    write(root, pictures(2))


def mixed_levels(root: Path) -> None:
    write(root / "a", pictures(2))
    write(root / "b" / "clip", pictures(2))


def empty_sequence(root: Path) -> None:
    write(root / "a", pictures(2))
    (root / "b").mkdir()


def empty_class(root: Path) -> None:
    write(root / "a" / "clip", pictures(2))
    (root / "b").mkdir()


def empty_clip(root: Path) -> None:
    write(root / "a" / "clip", pictures(2))
    (root / "a" / "hollow").mkdir()


def unequal_counts(root: Path) -> None:
    write(root / "a", pictures(2))
    write(root / "b", pictures(3))


def unequal_sizes(root: Path) -> None:
    write(root / "a", pictures(2))
    write(root / "b", pictures(2, shape=(5, 8)))


def no_picture(root: Path) -> None:
    write(root / "a", pictures(2))
    (root / "a" / "frame1.png").write_bytes(b"this is text")


def cut_picture(root: Path) -> None:
    write(root / "a", pictures(2, shape=(64, 64)))
    whole = (root / "a" / "frame1.png").read_bytes()
    (root / "a" / "frame1.png").write_bytes(whole[: len(whole) // 2])


def floating_picture(root: Path) -> None:
    write(root / "a", pictures(2).astype(np.float32), ["0.tif", "1.tif"])


def single_frame(root: Path) -> None:
    write(root / "a", pictures(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "holds no folders"),
        (frames_in_the_root, "holds pictures, but no folders"),
        (mixed_levels, "b/clip, further down: all sub-folders must be of one kind"),
        (empty_sequence, "b holds neither pictures"),
        (empty_class, "b holds neither pictures"),
        (empty_clip, "hollow holds neither pictures"),
        (unequal_counts, "b holds 3 frames, but .*a 2"),
        (unequal_sizes, r"b.frame0.png has 8 x 5 pixels, but .*a.frame0.png 7 x 5"),
        (no_picture, "frame1.png cannot be read"),
        (cut_picture, "frame1.png cannot be read"),
        (floating_picture, "0.tif has pixels of mode 'F': .* save it"),
        (single_frame, "at least 2 frames"),
    ],
)
def test_bad_folders(tmp_path: Path, make, message: str) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        Sequences(tmp_path)


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        Sequences(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        Sequences([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="holds no pictures"):
        Sequences([tmp_path])


ZEROS = torch.zeros(3, 4, 5, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": ZEROS[0, 0]}, r"\[N, T\+1, H, W\] or"),
        ({"source": ZEROS[:0]}, "at least one"),
        ({"source": ZEROS[:, :1]}, "at least 2 frames"),
        ({"source": torch.zeros(3, 4, 5, 7, 3)}, "channels-last"),
        ({"source": ZEROS - 0.1}, r"must lie in \[0, 1\]"),
        ({"source": ZEROS + 255}, "divide them by 255"),
        ({"source": ZEROS * float("nan")}, "NaN"),
        ({"source": ZEROS.long()}, "uint8, or floating point"),
        ({"source": []}, "the list is empty"),
        ({"source": [ZEROS[0], ZEROS[0, :3]]}, "sequence 1 holds 3 frames, but sequence 0 4: .* window="),
        ({"source": [ZEROS[0, 0]]}, "each sequence of a list"),
        ({"source": ZEROS, "k": [0, 1]}, r"3 sequences, but the labels k have shape \[2\]"),
        ({"source": ZEROS, "k": [0, -1, 0]}, "integers from 0"),
        ({"source": ZEROS, "k": [0.0, 1.0, 0.0]}, "integers from 0"),
        ({"source": ZEROS, "k": [0, 2, 0], "flow_names": ["a", "b"]}, "only 2 flow_names"),
        ({"source": ZEROS, "flow_names": ["a"]}, "no labels"),
        ({"source": ZEROS, "t": [0, 1]}, "4 strictly increasing times"),
        ({"source": ZEROS, "t": [0, 1, 1, 2]}, "4 strictly increasing times"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sequences(**arguments)


def test_things_that_are_no_arrays() -> None:
    with pytest.raises(TypeError, match="list of either, got int"):
        Sequences([1, 2])
