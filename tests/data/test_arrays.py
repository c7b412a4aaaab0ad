"""Arrays as users have them: other byte orders, strides, axes and depths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import flowfactor as ff
from flowfactor.data import Sequences

FRAMES = np.random.default_rng(0).random((6, 4, 3, 8, 12)).astype(np.float32)


@pytest.mark.parametrize(
    "array",
    [FRAMES.astype(">f4"), FRAMES[::-1, :, :, ::-1].copy()[::-1, :, :, ::-1], np.asfortranarray(FRAMES)],
    ids=["big-endian", "negative strides", "Fortran order"],
)
def test_byte_order_and_strides_do_not_matter(array: np.ndarray) -> None:
    assert torch.equal(Sequences(array).frames, torch.tensor(FRAMES))
    assert torch.equal(Sequences(list(array)).frames, torch.tensor(FRAMES))
    flows = {"turn": (ff.data.Rotate(), 0, 10)}
    assert torch.equal(ff.data.TransformedImages(array[:, 0], flows, 3).images, torch.tensor(FRAMES[:, 0]))


def test_labels_and_times_of_any_byte_order() -> None:
    k = np.array([0, 1, 0, 1, 0, 1], dtype=">u2")
    data = Sequences(FRAMES, k=k[::-1], t=np.array([3, 2, 1, 0], dtype=">f8")[::-1])
    assert data.fixed_k.tolist() == [1, 0, 1, 0, 1, 0] and data.t.tolist() == [0, 1, 2, 3]


def test_sixteen_bits_are_a_number_from_0_to_1() -> None:
    deep = np.round(FRAMES * 65535).astype(np.uint16)
    for array in (deep, deep.astype(">u2"), torch.from_numpy(deep)):
        torch.testing.assert_close(Sequences(array).frames, torch.tensor(FRAMES), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["n t h w c", "t n c h w", "c t n w h", "nthwc", "h w n t c"])
def test_axes_in_any_order(layout: str) -> None:
    axes = layout.replace(" ", "")
    moved = np.transpose(FRAMES, ["ntchw".index(axis) for axis in axes])
    assert torch.equal(Sequences(moved, layout=layout).frames, torch.tensor(FRAMES))


def test_moving_mnist_is_read_by_its_layout(tmp_path: Path) -> None:
    np.save(tmp_path / "mnist_test_seq.npy", np.arange(20 * 100, dtype=np.uint16).reshape(20, 100, 1, 1).repeat(8, 2))
    data = Sequences(tmp_path / "mnist_test_seq.npy", layout="t n h w")
    assert len(data) == 100 and data.num_steps == 19 and data.image_shape == (1, 8, 1)
    assert torch.equal((data[3]["frames"][:, 0, 0, 0] * 65535).round().int(), torch.arange(20).int() * 100 + 3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 4, 28, 28, 1), r"frames \[5, 4, 28, 28, 1\] look channels-last.*layout='n t h w c'"),
        ((5, 4, 28, 28, 3), "look channels-last"),
        ((5, 28, 28, 3), r"look channels-last: .*layout='t h w c'"),
        ((20, 1000, 8, 8), r"would be 20 sequences of 1000 frames each: .*layout='t n h w'; .*layout='n t h w'"),
        ((5, 3, 16, 28, 28), r"3 frames with 16 channels: .*layout='n c t h w'"),
        ((28, 28), r"for another order of axes say layout="),
    ],
)
def test_axes_that_look_swapped_are_told(shape: tuple[int, ...], message: str) -> None:
    array = np.zeros(shape, dtype=np.uint8)
    with pytest.raises(ValueError, match=message):
        Sequences(array)
    if len(shape) == 5:  # who says that it is so is believed
        assert len(Sequences(array, layout="n t c h w")) == shape[0]


def test_long_recordings_are_no_wonder_where_they_are_cut() -> None:
    assert len(Sequences(np.zeros((2, 500, 8, 8), np.uint8), window=10)) == 100
    assert len(Sequences(np.zeros((2, 500, 8, 8), np.uint8), layout="n t h w")) == 2


def test_images_with_one_last_channel_are_told() -> None:
    with pytest.raises(ValueError, match="channels-last"):
        ff.data.TransformedImages(torch.rand(5, 28, 28, 1), {"turn": (ff.data.Rotate(), 0, 10)}, 3)


@pytest.mark.parametrize("layout", ["n t h", "n t h w w", "b t h w", "", 3])
def test_layouts_that_are_none_are_told(layout: object) -> None:
    with pytest.raises(ValueError, match="layout names every axis"):
        Sequences(FRAMES, layout=layout)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \[6, 4, 3, 8, 12\], but the layout 'n t h w' 4 axes"):
        Sequences(FRAMES, layout="n t h w")


def test_arrays_of_no_numbers_are_told() -> None:
    with pytest.raises(TypeError, match="numbers"):
        Sequences(np.full((2, 3, 4, 4), "a"))
    with pytest.raises(TypeError, match="numbers"):
        Sequences(np.full((2, 3, 4, 4), None))
