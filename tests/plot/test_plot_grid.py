"""Strips and files: every pixel where it belongs, nothing half written."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from flowfactor import plot


def test_strips_interleave_and_keep_every_pixel(generator: torch.Generator) -> None:
    first, second = (torch.rand(2, 3, 3, 5, 7, generator=generator) for _ in range(2))
    picture = plot.strips(first, second, pad=2, background=0.5)
    assert picture.shape == (2 + 4 * 5 + 2 * 2 + 6 + 2, 2 + 3 * 7 + 2 * 2 + 2, 3)
    tops, lefts = [2, 9, 20, 27], [2, 11, 20]  # the gap between the two samples is three times as wide
    inside = np.zeros(picture.shape[:2], dtype=bool)
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            expected = (first, second)[row % 2][row // 2, column].permute(1, 2, 0).numpy()
            assert np.array_equal(picture[top : top + 5, left : left + 7], expected)
            inside[top : top + 5, left : left + 7] = True
    assert (picture[~inside] == 0.5).all()


def test_strips_show_grey_as_grey_and_scale_by_whole_pixels() -> None:
    grey = torch.tensor([[[[[0.0, 0.25], [0.5, 1.0]]]]])
    picture = plot.strips(grey, pad=0, scale=3)
    expected = np.kron(grey[0, 0, 0].numpy(), np.ones((3, 3)))
    assert np.array_equal(picture, np.repeat(expected[..., None], 3, axis=-1).astype(np.float32))


def test_small_overshoot_is_clipped_and_the_input_left_alone() -> None:
    frames = torch.tensor([-0.1, 1.1]).reshape(1, 1, 1, 1, 2)
    assert plot.strips(frames, pad=0)[0, :, 0].tolist() == [0.0, 1.0]
    assert frames.flatten().tolist() == pytest.approx([-0.1, 1.1])


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 5, 5), ValueError, "C = 1 or 3"),
        (torch.zeros(3, 1, 5, 5), ValueError, r"\[N, T, C, H, W\]"),
        (torch.zeros(0, 3, 1, 5, 5), ValueError, "nothing empty"),
        (torch.zeros(1, 3, 1, 5, 5, dtype=torch.uint8), TypeError, "/ 255"),
        (np.zeros((1, 3, 1, 5, 5)), TypeError, "ndarray"),
        (torch.full((1, 3, 1, 5, 5), torch.nan), ValueError, "NaN"),
        (torch.full((1, 3, 1, 5, 5), 255.0), ValueError, "255"),
    ],
)
def test_strips_refuse_what_is_no_frames(frames, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot.strips(frames)


def test_strips_refuse_settings_and_shapes_that_do_not_fit() -> None:
    frames = torch.zeros(2, 3, 1, 5, 5)
    with pytest.raises(ValueError, match="argument 2"):
        plot.strips(frames, frames[:1])
    with pytest.raises(ValueError, match="pad"):
        plot.strips(frames, pad=-1)
    with pytest.raises(TypeError, match="scale"):
        plot.strips(frames, scale=1.5)
    with pytest.raises(ValueError, match="background"):
        plot.strips(frames, background=2)


@pytest.mark.parametrize("kind", ["array", "tensor", "bytes"])
def test_a_saved_picture_reads_back_exactly(tmp_path, kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    floats = values.astype(np.float32) / 255
    picture = {"array": floats, "tensor": torch.from_numpy(floats), "bytes": values}[kind]
    path = plot.save(picture, tmp_path / "a.png", scale=2)
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), values.repeat(2, 0).repeat(2, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_figure_is_saved_at_its_resolution(tmp_path) -> None:
    path = plot.save(Figure(figsize=(2, 1)), str(tmp_path / "f.png"), dpi=50)
    with Image.open(path) as image:
        assert image.size == (100, 50)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path) -> None:
    path = tmp_path / "f.png"
    path.write_bytes(b"old")

    class Broken(Figure):
        def savefig(self, fname, **options) -> None:
            fname.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        plot.save(Broken(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_save_refuses_bad_input(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"\.png"):
        plot.save(np.zeros((4, 4)), tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError, match="create it"):
        plot.save(np.zeros((4, 4)), tmp_path / "nowhere" / "a.png")
    with pytest.raises(ValueError, match="channels come last"):
        plot.save(torch.zeros(3, 8, 8), tmp_path / "a.png")
    with pytest.raises(TypeError, match="int64"):
        plot.save(torch.zeros(8, 8, 3, dtype=torch.int64), tmp_path / "a.png")
    with pytest.raises(TypeError, match="str"):
        plot.save("picture", tmp_path / "a.png")
    with pytest.raises(ValueError, match="dpi"):
        plot.save(Figure(), tmp_path / "a.png", dpi=0)
    assert not list(tmp_path.iterdir())


def test_a_gif_of_few_colours_is_exact(tmp_path) -> None:
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (200, 3), dtype=np.uint8)
    frames = colours[generator.integers(0, 200, (5, 12, 9))]
    path = plot.to_gif(frames, tmp_path / "a.gif", fps=20, scale=2)
    with Image.open(path) as image:
        assert (image.n_frames, image.info["duration"], image.info["loop"]) == (5, 50, 0)
        for i, frame in enumerate(frames):
            image.seek(i)
            assert np.array_equal(np.asarray(image.convert("RGB")), frame.repeat(2, 0).repeat(2, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


def test_a_gif_of_many_colours_comes_close(tmp_path) -> None:
    x = torch.linspace(0, 1, 64)
    ramps = torch.stack([torch.stack([x.expand(64, 64), x[:, None].expand(64, 64), x * 0 + s + 0 * x[:, None]], -1)
                         for s in (0.2, 0.8)])  # fmt: skip
    path = plot.to_gif(ramps, tmp_path / "a.gif", loop=False)
    with Image.open(path) as image:
        assert "loop" not in image.info
        shown = np.asarray(image.convert("RGB")) / 255
    assert np.abs(shown - ramps[0].numpy()).mean() < 0.03


def test_to_gif_refuses_bad_input(tmp_path) -> None:
    frames = np.zeros((2, 4, 4, 3))
    for fps in (0, 51, float("nan")):
        with pytest.raises(ValueError, match="fps"):
            plot.to_gif(frames, tmp_path / "a.gif", fps=fps)
    with pytest.raises(ValueError, match=r"\[T, H, W, 3\]"):
        plot.to_gif(frames[0], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="not be empty"):
        plot.to_gif(frames[:0], tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"\.gif"):
        plot.to_gif(frames, tmp_path / "a.png")


def test_a_missing_extra_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"flowfactor\[plot\]"):
        plot.save(np.zeros((4, 4)), tmp_path / "a.png")
