"""TransformedImages: items, batches, epochs and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from flowfactor.data import Hue, Rotate, Scale, TransformedImages, colour

FLOWS = {"grow": (Scale(), 1.0, 1.8), "turn": (Rotate(), 0.0, 80.0), "paint": (Hue(), 0.0, 160.0)}


@pytest.fixture
def digits(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(256, (20, 10, 12), generator=generator, dtype=torch.uint8)


@pytest.fixture
def data(digits: torch.Tensor) -> TransformedImages:
    return TransformedImages(digits, FLOWS, steps=8, colour="red")


def test_facts(data: TransformedImages) -> None:
    assert len(data) == 20
    assert data.num_flows == 3
    assert data.flow_names == ("grow", "turn", "paint")
    assert data.num_steps == 8
    assert data.image_shape == (3, 10, 12)
    assert data.t.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    torch.testing.assert_close(data.transforms["grow"][1], torch.linspace(1, 1.8, 9, dtype=torch.float64))


def test_items(data: TransformedImages, digits: torch.Tensor) -> None:
    item = data[4]
    assert set(item) == {"frames", "k", "t"}
    assert item["k"] == 1
    assert isinstance(item["k"], int)
    assert item["frames"].shape == (9, 3, 10, 12)
    assert item["frames"].dtype == torch.float32
    red = digits[4].float()[None] / 255 * colour("red")[:, None, None]
    torch.testing.assert_close(item["frames"], Rotate()(red[None], torch.linspace(0, 80, 9))[0], atol=1e-5, rtol=0)
    assert data[4, 2]["k"] == 2
    torch.testing.assert_close(data[4, 2]["frames"][0], red, atol=1e-6, rtol=0)
    assert torch.equal(data[-1]["frames"], data[19]["frames"])
    with pytest.raises(IndexError, match="20"):
        data[20]


def test_batch_agrees_with_items_in_any_order(data: TransformedImages) -> None:
    indices, k = [3, 9, 3, 0, 7], [2, 0, 1, 2, 0]
    batch = data.batch(indices, k)
    assert batch["frames"].shape == (5, 9, 3, 10, 12)
    assert batch["k"].tolist() == k
    assert batch["k"].dtype == torch.int64
    for n, (index, flow) in enumerate(zip(indices, k, strict=True)):
        torch.testing.assert_close(batch["frames"][n], data[index, flow]["frames"], atol=1e-6, rtol=0)


def test_batch_draws_k_with_a_generator(data: TransformedImages) -> None:
    indices = [0] * 200
    one, two = (data.batch(indices, generator=torch.Generator().manual_seed(5))["k"] for _ in range(2))
    assert torch.equal(one, two)
    assert one.bincount(minlength=3).min() > 40
    assert data.batch([0, 1, 2, 3])["k"].tolist() == [0, 1, 2, 0]
    assert data.batch([], 0)["frames"].shape == (0, 9, 3, 10, 12)


def test_epochs_are_stratified_sorted_and_without_replacement(data: TransformedImages) -> None:
    plan = data.plan(6, generator=torch.Generator().manual_seed(1))
    assert len(plan) == 3
    assert all(k.tolist() == [0, 0, 1, 1, 2, 2] for _, k in plan)
    drawn = torch.cat([indices for indices, _ in plan]).tolist()
    assert len(set(drawn)) == len(drawn) == 18
    batches = list(data.batches(6, generator=torch.Generator().manual_seed(1)))
    for (indices, k), batch in zip(plan, batches, strict=True):
        torch.testing.assert_close(batch["frames"], data.batch(indices, k)["frames"])
    other = data.plan(6, generator=torch.Generator().manual_seed(2))
    assert torch.cat([indices for indices, _ in other]).tolist() != drawn


def test_remainders_go_round(data: TransformedImages) -> None:
    counts = torch.stack([k.bincount(minlength=3) for _, k in data.plan(4, drop_last=False)])
    assert counts.sum(1).tolist() == [4] * 5
    assert (counts.amax(1) - counts.amin(1)).max() <= 1
    assert counts[:3].sum(0).tolist() == [4, 4, 4]


def test_plain_epochs(data: TransformedImages) -> None:
    plan = data.plan(7, shuffle=False, drop_last=False)
    assert [len(indices) for indices, _ in plan] == [7, 7, 6]
    assert torch.cat([indices for indices, _ in plan]).tolist() == list(range(20))
    free = data.plan(10, stratified=False, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(k, k.sort().values) for _, k in free)
    assert len({tuple(k.bincount(minlength=3).tolist()) for _, k in free}) == 2


def test_images_of_every_kind(generator: torch.Generator) -> None:
    floats = torch.rand(4, 3, 8, 8, generator=generator)
    flows = [(Rotate(), [0.0, 10.0, 40.0])]
    one = TransformedImages(floats, flows, steps=2)
    two = TransformedImages(floats.double().numpy(), flows, steps=2)
    assert one.flow_names == ("rotation",)
    torch.testing.assert_close(one.batch([0, 1])["frames"], two.batch([0, 1])["frames"])
    read_only = np.zeros((4, 8, 8), dtype=np.uint8)
    read_only.flags.writeable = False
    assert TransformedImages(read_only, flows, steps=2).image_shape == (1, 8, 8)


def test_a_function_is_a_transformation(digits: torch.Tensor) -> None:
    def fade(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        return images[:, None] * amounts.to(images)[:, None, None, None]

    data = TransformedImages(digits, {"fade": (fade, 1.0, 0.0)}, steps=4, colour="green")
    frames = data[0]["frames"]
    torch.testing.assert_close(frames[2], frames[0] / 2)
    assert frames[:, [0, 2]].max() == 0


def test_subset_and_labels(digits: torch.Tensor) -> None:
    data = TransformedImages(digits, FLOWS, colour="red", labels=torch.arange(20) % 10)
    part = data.subset(data.labels < 3)
    assert len(part) == 6
    assert part.labels.tolist() == [0, 1, 2, 0, 1, 2]
    torch.testing.assert_close(part[3, 1]["frames"], data[10, 1]["frames"])
    assert len(data) == 20
    assert part.subset([0, 5]).labels.tolist() == [0, 2]
    for wrong in (torch.ones(3, dtype=torch.bool), torch.zeros(20, dtype=torch.bool), [20]):
        with pytest.raises(ValueError, match=r"mask|subset|indices"):
            data.subset(wrong)


def test_works_with_torchs_loader(data: TransformedImages) -> None:
    batch = next(iter(DataLoader(data, batch_size=5)))
    assert batch["frames"].shape == (5, 9, 3, 10, 12)
    assert batch["k"].tolist() == [0, 1, 2, 0, 1]


def test_to_a_device_gives_a_copy_there(data: TransformedImages) -> None:
    moved = data.to("meta")
    assert moved.images.device.type == moved.t.device.type == "meta"
    assert data.images.device.type == "cpu"


def mono(**changes) -> dict:
    return {"images": torch.rand(3, 1, 6, 6), "transforms": {"turn": (Rotate(), 0, 80)}, "steps": 4} | changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (mono(images=torch.rand(3, 1, 6, 6) * 2 + 1), "divide them by 255"),
        (mono(images=torch.full((3, 6, 6), float("nan"))), "NaN"),
        (mono(images=torch.zeros(3, 6, 6, dtype=torch.int64)), "uint8, or floating point"),
        (mono(images=torch.rand(6, 6)), r"\[N, H, W\] or \[N, C, H, W\]"),
        (mono(images=torch.rand(0, 1, 6, 6)), "at least one"),
        (mono(images=torch.rand(3, 6, 6, 3)), "channels-last"),
        (mono(images=torch.rand(3, 3, 6, 6), colour="red"), "have 3 channels"),
        (mono(colour="mauve"), "unknown colour"),
        (mono(steps=0), "steps must be"),
        (mono(transforms={}), "empty"),
        (mono(transforms=[(lambda i, a: i, 0, 1)]), "has no name"),
        (mono(transforms=[(Rotate(), 0, 1), (Rotate(), 0, 2)]), "two transformations are named 'rotation'"),
        (mono(transforms={"turn": (Rotate(), [0.0, 1.0])}), "needs 5 finite amounts"),
        (mono(transforms={"grow": (Scale(), 0.0, 1.0)}), "above 0"),
        (mono(transforms={"hue": (Hue(), 0.0, 1.0)}), "needs RGB"),
        (mono(transforms={"bad": (lambda i, a: i, 0, 1)}), "gave frames"),
        (mono(transforms={"bad": (lambda i, a: i[:, None].repeat(1, 5, 1, 1, 1) - 2, 0, 1)}), "must lie in"),
        (mono(labels=[1, 2]), "3 images but 2 labels"),
        (mono(t=[0, 1, 2]), "5 strictly increasing"),
        (mono(t=[0, 1, 2, 2, 3]), "5 strictly increasing"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformedImages(**arguments)


def test_steps_are_a_whole_number() -> None:
    with pytest.raises(TypeError, match=r"steps must be an integer, got 2\.5 \(a sequence has steps \+ 1 frames\)"):
        TransformedImages(**mono(steps=2.5))


def test_bad_schedule_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"\(transform, start, end\)"):
        TransformedImages(torch.rand(3, 1, 6, 6), {"turn": Rotate()})


@pytest.mark.parametrize(
    ("indices", "k", "message"),
    [
        ([20], 0, r"\[0, 20\)"),
        ([-1], 0, r"\[0, 20\)"),
        ([0.5], 0, "integers"),
        ([0, 1], [0], "k must be"),
        ([0, 1], 3, r"k must lie in \[0, 3\) \(grow, turn, paint\)"),
        ([0, 1], [0, -1], "k must lie"),
        ([0, 1], 0.5, "k must be"),
    ],
)
def test_bad_batches(data: TransformedImages, indices: list, k, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.batch(indices, k)


@pytest.mark.parametrize(("size", "message"), [(0, "between 1 and the 20"), (21, "drop_last"), (2, "at least 3")])
def test_bad_batch_sizes(data: TransformedImages, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.batches(size)
