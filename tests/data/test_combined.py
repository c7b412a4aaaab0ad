"""Sequences that combine and switch: the weights are the truth, and the frames show it."""

from __future__ import annotations

import pytest
import torch

import flowfactor as ff
from flowfactor.data import (
    COMBINED_MODES,
    CombinedImages,
    CombinedScenes,
    Compose,
    Hue,
    Perspective,
    Rotate,
    Scale,
    Scenes,
    TransformedImages,
    Translate,
    paper_transforms,
    weights_schedule,
)

FLOWS = {"grow": (Scale(), 1.0, 1.8), "turn": (Rotate(), 0.0, 80.0), "paint": (Hue(), 0.0, 160.0)}


@pytest.fixture
def digits() -> torch.Tensor:
    return torch.randint(256, (60, 12, 12), dtype=torch.uint8)


@pytest.fixture
def data(digits: torch.Tensor) -> CombinedImages:
    return CombinedImages(digits, FLOWS, steps=6, colour="red")


def test_items_and_batches(data: CombinedImages) -> None:
    item = data[4]
    assert set(item) == {"frames", "t", "k", "weights"}
    assert item["frames"].shape == (7, 3, 12, 12)
    assert item["weights"].shape == (6, 3)
    assert item["weights"].dtype == torch.float32
    assert item["k"] == -1
    assert (data.flow_names, data.num_flows, data.num_steps) == (("grow", "turn", "paint"), 3, 6)
    batch = data.batch([9, 4, 4])
    assert batch["weights"].shape == (3, 6, 3)
    torch.testing.assert_close(batch["frames"][1], item["frames"])
    assert torch.equal(batch["weights"], data.weights[[9, 4, 4]])
    assert data.batch([])["frames"].shape == (0, 7, 3, 12, 12)
    with pytest.raises(ValueError, match="k contradicts"):
        data.batch([0], k=1)


def test_modes_come_in_equal_shares_and_do_what_they_say(data: CombinedImages) -> None:
    assert data.modes == COMBINED_MODES
    assert data.mode.bincount().tolist() == [20, 20, 20]
    active = data.weights > 0
    single, superpose, switch = (active[data.mode == m] for m in range(3))
    assert torch.equal(single, single[:, :1].expand_as(single))
    assert bool((single.sum(-1) == 1).all())
    assert torch.equal(superpose, superpose[:, :1].expand_as(superpose))
    assert bool((superpose.sum(-1) == 2).all())
    assert bool((switch.sum(-1) == 1).all())
    which = switch.int().argmax(-1)
    assert bool(((which.diff(dim=1) != 0).sum(1) == 1).all())
    when = (which.diff(dim=1) != 0).int().argmax(1)
    assert len(when.unique()) > 3  # midway, anywhere
    assert len({(int(row[0]), int(row[-1])) for row in which}) == 6
    assert set(data.weights.unique().tolist()) == {0.0, 1.0}


def test_the_draws_are_seeded(digits: torch.Tensor) -> None:
    first, again, other = (CombinedImages(digits, FLOWS, steps=6, colour="red", seed=s) for s in (3, 3, 4))
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.weights, other.weights)


def test_one_alone_is_the_sequence_of_transformed_images(data: CombinedImages, digits: torch.Tensor) -> None:
    plain = TransformedImages(digits, FLOWS, steps=6, colour="red")
    for k in range(3):
        weights = torch.zeros(5, 6, 3)
        weights[..., k] = 1
        found = data.transform(digits[:5, None] / 255, weights)
        torch.testing.assert_close(found, plain.batch(range(5), k)["frames"], atol=1e-5, rtol=0)


def test_superposed_frames_by_composition(digits: torch.Tensor) -> None:
    """Turning and hue at once is `Compose`; a coloured picture's path agrees with the tinted one's."""
    data = CombinedImages(digits, FLOWS, steps=6, colour="red")
    weights = torch.zeros(4, 6, 3)
    weights[..., 1] = weights[..., 2] = 1
    both = Compose((Rotate(), 0.0, 80.0), (Hue(), 0.0, 160.0))
    red = digits[:4, None] / 255 * ff.data.colour("red")[:, None, None]
    expected = both(red, torch.linspace(0, 1, 7))
    torch.testing.assert_close(data.transform(digits[:4, None] / 255, weights), expected, atol=1e-5, rtol=0)
    coloured = CombinedImages(red, FLOWS, steps=6)
    torch.testing.assert_close(coloured.transform(red, weights), expected, atol=1e-4, rtol=0)


def test_a_switch_goes_on_from_where_the_first_stopped(digits: torch.Tensor) -> None:
    """Scaling and rotation commute: up to the switch the one, from there the other of the picture scaled so far."""
    data = CombinedImages(digits, FLOWS, steps=6, colour="red")
    weights = torch.zeros(2, 6, 3)
    weights[:, :2, 0] = 1
    weights[:, 2:, 1] = 1
    frames = data.transform(digits[:2, None] / 255, weights)
    plain = TransformedImages(digits, FLOWS, steps=6, colour="red")
    torch.testing.assert_close(frames[:, :3], plain.batch([0, 1], 0)["frames"][:, :3], atol=1e-5, rtol=0)
    after = Compose((Scale(), 1.0 + 0.8 / 3, 1.0 + 0.8 / 3), (Rotate(), 0.0, 80.0 * 4 / 6))
    red = digits[:2, None] / 255 * ff.data.colour("red")[:, None, None]
    torch.testing.assert_close(frames[:, 2:], after(red, torch.linspace(0, 1, 5)), atol=1e-5, rtol=0)


def test_weights_are_paces(digits: torch.Tensor) -> None:
    data = CombinedImages(digits, {"turn": (Rotate(), 0.0, 60.0), "paint": (Hue(), [0.0, 10.0, 90.0])}, 2, colour="red")
    weights = torch.tensor([[[0.5, 0.25], [0.25, 1.0]]])
    frames = data.transform(digits[:1, None] / 255, weights)[0]
    red = ff.data.colour("red")
    for frame, angle, hue in zip(frames, (0.0, 15.0, 22.5), (0.0, 2.5, 30.0), strict=True):
        expected = (
            Rotate()(digits[:1, None] / 255, [angle])[0, 0] * Hue().colours(torch.tensor([hue]), red)[0, :, None, None]
        )
        torch.testing.assert_close(frame, expected, atol=1e-5, rtol=0)


def test_strengths_stay_in_their_range(digits: torch.Tensor) -> None:
    data = CombinedImages(digits, FLOWS, steps=6, colour="red", strength=(0.3, 0.6))
    held = data.weights[data.weights > 0]
    assert 0.3 <= held.min() < 0.35
    assert 0.55 < held.max() <= 0.6
    weights = data.weights[data.mode == 1]
    assert torch.equal(weights, weights[:, :1].expand_as(weights))  # one strength all along


def test_chosen_and_mixed_modes(digits: torch.Tensor) -> None:
    settings = {"steps": 6, "colour": "red"}
    assert CombinedImages(digits, FLOWS, modes=("switch",), **settings).mode.unique().tolist() == [0]
    mixed = CombinedImages(digits, FLOWS, modes={"superpose": 1, "single": 3}, **settings)
    assert mixed.modes == ("superpose", "single")
    assert mixed.mode.bincount().tolist() == [15, 45]


def test_composed_and_projective_transformations(digits: torch.Tensor) -> None:
    flows = paper_transforms(4, ("perspective", "rotation+hue", "scaling"))
    data = CombinedImages(digits, flows, steps=4, colour="red")
    weights = torch.zeros(3, 4, 3)
    weights[..., 1] = 1
    expected = TransformedImages(digits, flows, 4, colour="red").batch([0, 1, 2], 1)["frames"]
    torch.testing.assert_close(data.transform(digits[:3, None] / 255, weights), expected, atol=1e-5, rtol=0)
    weights[..., 0] = 1
    tilted = Perspective().matrices(torch.tensor([30.0]).double(), 12, 12)
    turned = Rotate().matrices(torch.tensor([40.0]).double(), 12, 12)
    from flowfactor.data._warp import warp

    grey = CombinedImages(
        digits, {n: f for n, f in flows.items() if n != "rotation+hue"} | {"turn": (Rotate(), 0, 40)}, 4
    )
    both = torch.zeros(3, 4, 3)
    both[..., 0] = both[..., 2] = 1
    expected = warp(digits[:3, None] / 255, tilted @ turned)[:, 0]
    torch.testing.assert_close(grey.transform(digits[:3, None] / 255, both)[:, -1], expected, atol=1e-5, rtol=0)


def test_epochs_subsets_and_loaders(data: CombinedImages) -> None:
    batches = list(data.batches(8, generator=torch.Generator().manual_seed(0)))
    assert len(batches) == 7
    assert all(batch["k"].tolist() == [-1] * 8 for batch in batches)
    part = data.subset([50, 7])
    torch.testing.assert_close(part[1]["frames"], data[7]["frames"])
    assert torch.equal(part[1]["weights"], data[7]["weights"])
    assert torch.equal(part.mode, data.mode[[50, 7]])
    loader = data.loader(16, generator=torch.Generator().manual_seed(0))
    assert len(loader) == 3
    assert next(iter(loader))["weights"].shape == (16, 6, 3)
    assert data.to("cpu")[3]["frames"].shape == (7, 3, 12, 12)


def test_schedules_act_as_the_weights_say() -> None:
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    switch = weights_schedule(weights, t=[0.0, 0.5, 1.0, 2.0, 4.0])
    assert isinstance(switch, ff.Schedule)
    assert switch.starts == (0.0, 1.0)
    assert switch.at(0.99).tolist() == [1, 0]
    assert switch.at(1.0).tolist() == [0, 1]
    batch = weights_schedule(torch.stack([weights, weights.flip(0)]))
    assert batch.starts == (0, 2)
    assert batch.at(3.0).tolist() == [[0, 1], [1, 0]]
    for bad, t, message in (
        (weights.long(), None, "floating point"),
        (weights[0], None, r"\[T, K\]"),
        (weights, [0, 1], "need 5 times"),
    ):
        with pytest.raises(ValueError, match=message):
            weights_schedule(bad, t)


def test_a_flow_under_a_schedule_goes_where_the_weights_say() -> None:
    """Two constant velocities: the flow moves by each as long and as strongly as it acts."""
    velocities = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    flow = ff.LatentFlow(ff.potentials.QuadraticPotential(2, 2, S=torch.zeros(2, 2, 2), b=velocities))
    weights = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 0.5]], [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])
    path = flow(torch.zeros(2, 2), torch.arange(4.0), weights_schedule(weights))
    expected = (weights @ velocities).cumsum(1)
    torch.testing.assert_close(path.z[1:].movedim(0, 1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modes": ("both",)}, "distinct names out of single, superpose, switch"),
        ({"modes": ()}, "distinct names"),
        ({"modes": {"single": 0.0}}, "finite and above 0"),
        ({"strength": (0.0, 1.0)}, "0 < low <= high <= 1"),
        ({"strength": (0.5, 1.5)}, "0 < low <= high <= 1"),
        ({"steps": 1}, "at least 2 steps"),
        ({"transforms": [(Rotate(), 0, 80)]}, "need two transformations"),
    ],
)
def test_bad_arguments(digits: torch.Tensor, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CombinedImages(digits, **{"transforms": FLOWS, "steps": 6, "colour": "red", **arguments})


def test_bad_transformations_and_weights(data: CombinedImages, digits: torch.Tensor) -> None:
    def blink(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        return images[:, None].expand(-1, len(amounts), -1, -1, -1)

    with pytest.raises(TypeError, match="only geometric transformations, Hue and Compose"):
        CombinedImages(digits, {"turn": (Rotate(), 0, 80), "blink": (blink, 0, 1)}, steps=6)
    images = digits[:2, None] / 255
    with pytest.raises(ValueError, match=r"weights \[B, 6, 3\]"):
        data.transform(images, torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        data.transform(images, torch.full((2, 6, 3), 1.5))


def test_weights_of_ones_own(data: CombinedImages, digits: torch.Tensor) -> None:
    weights = torch.zeros(6, 3)
    weights[2:, 0] = weights[:, 1] = 1
    weights[:3, 2] = 0.5
    made, before = data.weighted(weights), data.weights.clone()
    assert torch.equal(made.weights, weights.expand(60, 6, 3)) and made.modes == ("given",)
    expected = data.transform(digits[[4, 9], None] / 255, weights.expand(2, 6, 3))
    torch.testing.assert_close(made.batch([4, 9])["frames"], expected)
    each = torch.rand(60, 6, 3)
    assert torch.equal(made.subset([3, 8]).weighted(each[:2]).batch([1])["weights"], each[1:2])
    assert torch.equal(data.weights, before) and data.mode.unique().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"weights must be \[6, 3\] or \[60, 6, 3\], got \[3\]"):
        data.weighted(torch.ones(3))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got -1 to 1"):
        data.weighted(torch.ones(6, 3) - 2 * torch.eye(6, 3))


# --- scenes -----------------------------------------------------------------------------------------------------------

SMALL = {"size": 8, "supersampling": 1, "steps": 3}


@pytest.fixture(scope="module", params=["combinations", "edges"])
def scenes(request: pytest.FixtureRequest) -> dict[str, Scenes]:
    settings = {"hues": 4, "scales": 4, "orientations": 4}
    if request.param == "edges":
        settings = {"hues": 4, "scales": 5, "orientations": 6, "vary": ff.data.SCENE_FACTORS}
    return {split: Scenes(split, **settings, **SMALL) for split in ("train", "test", "all")}


def test_the_number_of_scenes_is_checked(scenes: dict[str, Scenes]) -> None:
    with pytest.raises(ValueError, match="count must be at least 1"):
        CombinedScenes(scenes["all"], 0)
    with pytest.raises(TypeError, match="count must be an integer"):
        CombinedScenes(scenes["all"], 2.5)


def test_scenes_move_as_their_weights_say(scenes: dict[str, Scenes]) -> None:
    for split, plain in scenes.items():
        data = CombinedScenes(plain, 90)
        assert len(data) == 90
        assert data.flow_names == plain.flow_names
        batch = data.batch(torch.arange(90))
        assert batch["weights"].shape == (90, 3, plain.num_flows)
        steps = batch["factors"].diff(dim=1)
        for k, name in enumerate(data.flow_names):
            f = plain.factor_names.index(name)
            size = (plain.values[f][1] - plain.values[f][0]).item()
            moved = steps[..., f].remainder(360) if name.endswith("hue") else steps[..., f]
            torch.testing.assert_close(moved, batch["weights"][..., k] * size, atol=1e-4, rtol=0)
        held = [f for f, name in enumerate(plain.factor_names) if name not in data.flow_names]
        assert not steps[..., held].any()
        torch.testing.assert_close(
            plain.render(batch["factors"], supersampling=1), batch["frames"], atol=2e-6, rtol=0, msg=split
        )
        assert data.mode.bincount().tolist() == [30, 30, 30]


def test_no_combined_frame_leaves_its_split(scenes: dict[str, Scenes]) -> None:
    seen = {}
    for split in ("train", "test"):
        data = CombinedScenes(scenes[split], 3000, modes=("superpose", "switch"))
        states = data.data.walk(data.scenes, data.weights > 0)
        seen[split] = {tuple(row) for row in states.flatten(0, 1).tolist()}
        own = {tuple(row) for row in data.data.scenes(torch.arange(len(data.data))).tolist()}
        assert seen[split] <= own
    assert not seen["train"] & seen["test"]


def test_scenes_under_weights_of_ones_own(scenes: dict[str, Scenes]) -> None:
    plain = scenes["test"]
    data, flows = CombinedScenes(plain, 50), plain.num_flows
    away = {pair[0] for pair in plain.apart}
    kept = [k for k in range(flows) if k not in away]
    weights = torch.zeros(3, flows)
    weights[:, kept] = 1
    made = data.weighted(weights)
    states = plain.walk(made.scenes, made.weights > 0)
    assert {tuple(row) for row in states.flatten(0, 1).tolist()} <= {
        tuple(row) for row in plain.scenes(torch.arange(len(plain))).tolist()
    }
    steps = made.batch([0, 1])["factors"].diff(dim=1)
    assert [bool(steps[..., plain.factor_names.index(name)].all()) for name in plain.flow_names] == [
        k in kept for k in range(flows)
    ]
    with pytest.raises(ValueError, match=r"must be 0 or 1, got \[0\.5\]"):
        data.weighted(torch.full((3, flows), 0.5))
    if away:
        with pytest.raises(ValueError, match="cannot both move in a sequence without leaving the split"):
            data.weighted(torch.ones(3, flows))


def test_combined_scenes_are_seeded_and_have_subsets(scenes: dict[str, Scenes]) -> None:
    first, again = (CombinedScenes(scenes["test"], 40, seed=2) for _ in range(2))
    torch.testing.assert_close(first[5]["frames"], again[5]["frames"])
    assert not torch.equal(first.scenes, CombinedScenes(scenes["test"], 40, seed=3).scenes)
    part = first.subset([5, 9]).to("cpu")
    torch.testing.assert_close(part[0]["frames"], first[5]["frames"])
    assert [len(batch["k"]) for batch in first.batches(10)] == [10] * 4


def test_bad_arguments_of_combined_scenes(digits: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="another grid of factors, got TransformedImages"):
        CombinedScenes(TransformedImages(digits, {"move": (Translate(), 0, 2)}, 2))
    one = Scenes(vary=("scale",), shapes=("cube",), scales=4, orientations=6, **SMALL)
    with pytest.raises(ValueError, match="count must be"):
        CombinedScenes(one, 0)
    with pytest.raises(ValueError, match="need two transformations"):
        CombinedScenes(one, 5)
    assert CombinedScenes(one, 5, modes=("single",))[0]["weights"].tolist() == [[1.0]] * 3
