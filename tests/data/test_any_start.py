"""Sequences that begin anywhere and run either way: against states that are put together by hand."""

from __future__ import annotations

import math

import pytest
import torch

import flowfactor as ff
from flowfactor.data import CombinedImages, Compose, Hue, Perspective, Rotate, Scale, TransformedImages, Translate
from flowfactor.data.starts import Draw, uniforms

FLOWS = {"grow": (Scale(), 1.0, 1.8), "turn": (Rotate(), 0.0, 80.0), "paint": (Hue(), 0.0, 160.0)}
RED = ff.data.colour("red")


@pytest.fixture
def digits() -> torch.Tensor:
    return torch.randint(256, (40, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def data(digits: torch.Tensor) -> TransformedImages:
    return TransformedImages(digits, FLOWS, steps=4, colour="red", start="any", direction="both")


def by_hand(image: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """One frame of one digit at (factor, angle, hue): by a `Compose` of its own."""
    factor, angle, hue = amounts.tolist()
    state = Compose((Scale(), factor, factor), (Rotate(), angle, angle), (Hue(), hue, hue))
    return state(image[None, None] / 255 * RED[:, None, None], [0.0])[0, 0]


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("is_backward", [False, True])
def test_frames_show_the_states(data: TransformedImages, digits: torch.Tensor, k: int, is_backward: bool) -> None:
    draw = Draw(7, is_backward)
    batch, amounts = data.batch([3, 9], k, draw), data.amounts([3, 9], k, draw)
    expected = torch.stack(
        [torch.stack([by_hand(digits[i], row) for row in rows]) for i, rows in zip((3, 9), amounts, strict=True)]
    )
    torch.testing.assert_close(batch["frames"], expected, atol=1e-4, rtol=0)
    assert batch["t"].tolist() == ([0, -1, -2, -3, -4] if is_backward else [0, 1, 2, 3, 4])


def test_one_acts_at_its_pace_and_the_others_hold(data: TransformedImages) -> None:
    everything = torch.arange(len(data))
    for k, step in enumerate((math.log(1.8) / 4, 20.0, 40.0)):
        amounts = data.amounts(everything, k)
        amounts[..., 0] = amounts[..., 0].log()
        steps = amounts.diff(dim=1)
        torch.testing.assert_close(steps[..., k], torch.full_like(steps[..., k], step))
        others = [flow for flow in range(3) if flow != k]
        assert bool((steps[..., others] == 0).all())


def test_states_lie_in_their_ranges_all_over(digits: torch.Tensor) -> None:
    data = TransformedImages(digits.repeat(50, 1, 1), FLOWS, steps=4, colour="red", start="any")
    everything = torch.arange(len(data))
    acting, held = (data.amounts(everything, k)[..., 0].log() / math.log(1.8) for k in (0, 1))
    for factors, ends in ((acting[:, 0], (-1, 0)), (acting[:, -1], (0, 1)), (held[:, 0], (-1, 1))):
        assert ends[0] <= factors.min() < ends[0] + 0.02
        assert ends[1] - 0.02 < factors.max() <= ends[1]
        middle, spread = sum(ends) / 2, (ends[1] - ends[0]) / math.sqrt(12)
        assert abs(factors.mean() - middle) < 4 * spread / math.sqrt(len(data))
        assert abs(factors.std() / spread - 1) < 0.05
    for flow in (1, 2):
        angles = data.amounts(everything, flow)[:, 0, flow]
        assert angles.remainder(360).histc(8, 0, 360).min() > 0.75 * len(data) / 8


def test_elements_do_not_share_their_draws() -> None:
    u = uniforms(0, torch.arange(20000), 3)
    correlation = torch.corrcoef(torch.cat([u[1:], u[:-1], uniforms(1, torch.arange(19999), 3)], 1).mT)
    assert (correlation - torch.eye(9)).abs().max() < 0.03
    assert len(u.unique()) == u.numel()


def test_a_sequence_does_not_depend_on_what_it_is_drawn_with(data: TransformedImages) -> None:
    draw = Draw(5, True)
    whole = data.batch(range(40), torch.arange(40) % 3, draw)["frames"]
    torch.testing.assert_close(data.batch([17, 4], [2, 1], draw)["frames"], whole[[17, 4]], atol=1e-6, rtol=0)
    part = data.subset([4, 17, 30])
    torch.testing.assert_close(part.batch([1, 0], [2, 1], draw)["frames"], whole[[17, 4]], atol=1e-6, rtol=0)
    assert not torch.allclose(data.batch([17, 4], [2, 1], Draw(6, True))["frames"], whole[[17, 4]], atol=1e-2)


def test_epochs_differ_and_are_the_same_again(data: TransformedImages) -> None:
    first, again = (data.loader(12, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    epochs = [list(first), list(first)]
    repeated = [list(again), list(again)]
    for one, other in zip([*epochs[0], *epochs[1]], [*repeated[0], *repeated[1]], strict=True):
        assert torch.equal(one["frames"], other["frames"])
        assert torch.equal(one["t"], other["t"])
    seeds = [drawn[2].seed for epoch in (0, 1) for drawn in first._plan(epoch)]
    assert len(set(seeds)) == 2


def test_half_of_the_batches_run_backwards(data: TransformedImages) -> None:
    begins = []
    for seed in range(12):
        ends = [float(b["t"][-1]) for b in data.batches(12, generator=torch.Generator().manual_seed(seed))]
        assert {abs(ends[0]), ends[0] + ends[1]} == {4.0, 0.0}
        assert ends[2] == ends[0]
        begins.append(ends[0])
    assert set(begins) == {4.0, -4.0}
    backward = data.running(direction="backward")
    assert all(b["t"][-1] == -4 for b in backward.batches(12))
    assert data.batch([0])["t"][-1] == 4  # by its index, forward


def test_a_backward_sequence_holds_the_same_frames(digits: torch.Tensor) -> None:
    for start, last in (("any", [0, -1, -2]), ("first", [2, 1, 0])):
        data = TransformedImages(digits, FLOWS, steps=2, colour="red", start=start)
        forward, back = (one.batch([1, 2, 3], [0, 1, 2]) for one in (data, data.running(direction="backward")))
        torch.testing.assert_close(back["frames"], forward["frames"].flip(1), atol=1e-6, rtol=0)
        assert back["t"].tolist() == last


def test_times_of_ones_own_run_back_from_the_start(digits: torch.Tensor) -> None:
    data = TransformedImages(digits, FLOWS, 2, colour="red", t=[1.0, 2.0, 5.0], start="any", direction="backward")
    assert data.batch([0])["t"].tolist() == [1.0, -2.0, -3.0]


def test_ranges_of_ones_own(digits: torch.Tensor) -> None:
    ranges = {"grow": (0.9, 2.0), "turn": (-100, 100)}
    data = TransformedImages(digits, FLOWS, 4, colour="red", start="any", ranges=ranges)
    grow, turn = data.amounts(range(40), 0)[..., 0], data.amounts(range(40), 1)[..., 1]
    assert 0.9 <= grow.min() < grow.max() <= 2.0
    assert -100 <= turn.min() < turn.max() <= 100


def test_falling_amounts_stay_in_their_range(digits: torch.Tensor) -> None:
    data = TransformedImages(digits, {"left": (Translate(), 0.0, -4.0)}, 4, start="any")
    amounts = data.amounts(range(40), 0)[..., 0]
    assert bool((amounts.diff() == -1).all())
    assert -4 <= amounts.min() < amounts.max() <= 4


def test_pictures_of_any_colour_and_grey_ones() -> None:
    pictures = torch.rand(6, 3, 9, 10)
    data = TransformedImages(pictures, FLOWS, steps=3, start="any")
    for k in range(3):
        amounts = data.amounts([2], k)[0]
        for frame, (factor, angle, hue) in zip(data.batch([2], k)["frames"][0], amounts.tolist(), strict=True):
            moved = Compose((Scale(), factor, factor), (Rotate(), angle, angle), (Hue(), hue, hue))
            torch.testing.assert_close(frame, moved(pictures[2:3], [0.0])[0, 0], atol=2e-4, rtol=0)
    grey = TransformedImages(
        pictures[:, :1], {"tilt": (Perspective(), 0.0, 60.0), "turn": FLOWS["turn"]}, 3, start="any"
    )
    tilt, angle = grey.amounts([1], 0)[0, 2].tolist()
    moved = Compose((Perspective(), tilt, tilt), (Rotate(), angle, angle))(pictures[1:2, :1], [0.0])[0, 0]
    torch.testing.assert_close(grey.batch([1], 0)["frames"][0, 2], moved, atol=1e-4, rtol=0)


def test_functions_of_ones_own_with_a_range(digits: torch.Tensor) -> None:
    def fade(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        return images[:, None] * amounts.to(images)[:, None, None, None]

    flows = {"fade": (fade, 1.0, 0.5), "turn": FLOWS["turn"]}
    with pytest.raises(ValueError, match=r"'fade' anywhere in its range.*ranges=\{'fade'"):
        TransformedImages(digits, flows, steps=2, start="any")
    data = TransformedImages(digits, flows, steps=2, start="any", ranges={"fade": (0.2, 1.0)})
    for k in (0, 1):
        amounts = data.amounts([5], k)[0]
        for frame, (light, angle) in zip(data.batch([5], k)["frames"][0], amounts.tolist(), strict=True):
            expected = light * Rotate()(digits[5:6, None] / 255, [angle])[0, 0]
            torch.testing.assert_close(frame, expected, atol=1e-5, rtol=0)


def test_circles_of_composed_transformations() -> None:
    assert Compose((Rotate(), 0.0, 80.0), (Hue(), 0.0, 160.0)).circle == 4.5
    assert Compose((Rotate(), 0.0, 80.0), (Hue(), 0.0, 130.0)).circle is None
    assert Compose((Rotate(), 0.0, 80.0), (Scale(), 1.0, 2.0)).circle is None
    picture = torch.rand(1, 3, 8, 8)
    both = Compose((Rotate(), 0.0, 80.0), (Hue(), 0.0, 160.0))
    once, round_again = both(picture, [0.3, 4.8])[0]
    torch.testing.assert_close(once, round_again, atol=1e-4, rtol=0)


def test_paces_of_scaling(digits: torch.Tensor) -> None:
    linear, geometric = (TransformedImages(digits, [(Scale(p), 1.0, 1.8)], 8) for p in (None, "geometric"))
    torch.testing.assert_close(linear.transforms["scaling"][1], torch.linspace(1, 1.8, 9).double())
    factors = geometric.transforms["scaling"][1]
    torch.testing.assert_close(factors[1:] / factors[:-1], torch.full((8,), 1.8 ** (1 / 8), dtype=torch.float64))
    kept = TransformedImages(digits, [(Scale("linear"), 1.0, 1.8)], 8, start="any")
    differences = kept.amounts([0], 0)[0, :, 0].diff()
    torch.testing.assert_close(differences, torch.full((8,), 0.1, dtype=torch.float64))
    # Longer sequences go on at the same pace, which is what an extrapolation is measured on.
    for start, pace in (("first", 0.1), ("any", math.log(1.8) / 8)):
        ways = [ff.data.paper_transforms(steps, start=start)["scaling"] for steps in (8, 16)]
        ends = [end if start == "first" else math.log(end) for _, _, end in ways]
        assert (ends[1] - ends[0]) / 8 == pytest.approx(pace)


def test_from_anywhere_to_the_first_start_the_pace_stays(data: TransformedImages, digits: torch.Tensor) -> None:
    first = data.running(start="first", direction="forward")
    assert (first.begins, data.begins) == ("first", "any")
    frames = first.batch([2], 0)["frames"][0]
    expected = Scale()(digits[2:3, None] / 255, 1.8 ** (torch.arange(5) / 4))[0] * RED[:, None, None]
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)
    again = first.running(start="any")
    assert torch.equal(again.batch([2], 0)["frames"], data.batch([2], 0)["frames"])


def test_fingerprints_tell_starts_directions_and_ranges_apart(digits: torch.Tensor) -> None:
    settings = [
        {},
        {"direction": "backward"},
        {"direction": "both"},
        {"start": "any"},
        {"start": "any", "direction": "both"},
        {"start": "any", "ranges": {"grow": (0.5, 2.0)}},
    ]
    marks = [TransformedImages(digits, FLOWS, 4, colour="red", **one).fingerprint()["sha256"] for one in settings]
    assert len(set(marks)) == len(marks)
    combined = [
        CombinedImages.of(TransformedImages(digits, FLOWS, 4, colour="red", **one)).fingerprint()["sha256"]
        for one in settings
    ]
    assert len(set(combined)) == len(combined)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "anywhere"}, "start is 'first', 'any', got 'anywhere'"),
        ({"direction": "back"}, "direction is 'forward', 'both', 'backward'"),
        ({"ranges": {"grow": (0.5, 2.0)}}, "have start='first'"),
        ({"start": "any", "ranges": {"size": (0.5, 2.0)}}, "ranges names 'size'"),
        ({"start": "any", "ranges": {"grow": (2.0, 0.5)}}, "low < high"),
        ({"start": "any", "ranges": {"grow": (-1.0, 2.0)}}, "does not have"),
        ({"start": "any", "ranges": {"grow": (1.0, 1.2)}}, "do not fit into its range 1 to 1.2"),
        ({"start": "any", "transforms": {"turn": (Rotate(), [0.0, 10.0, 40.0, 50.0, 60.0])}}, "one pace"),
        ({"start": "any", "transforms": {"turn": (Rotate(), 3.0, 3.0)}}, "one pace"),
        ({"transforms": {"grow": (Scale("geometric"), 0.0, 1.0)}}, "cannot go from 0.0 to 1.0"),
    ],
)
def test_refusals(digits: torch.Tensor, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformedImages(digits, settings.pop("transforms", FLOWS), 4, **({"colour": "red"} | settings))
    with pytest.raises(ValueError, match="pace is"):
        Scale("cubic")  # type: ignore[arg-type]


def test_recorded_sequences_run_backwards_and_begin_where_they_do() -> None:
    films = ff.data.Sequences(torch.rand(3, 4, 1, 6, 6))
    back = films.running(direction="backward")
    assert torch.equal(back.batch([1])["frames"], films.batch([1])["frames"].flip(1))
    assert back.batch([1])["t"].tolist() == [3, 2, 1, 0]
    with pytest.raises(ValueError, match="sequences of Sequences begin where the data say"):
        films.running(start="any")


@pytest.mark.parametrize("settings", [{"start": "any", "direction": "both"}, {"direction": "backward"}])
def test_promises(digits: torch.Tensor, settings: dict) -> None:
    data = TransformedImages(digits, FLOWS, 3, colour="red", **settings)
    ff.testing.check_dataset(data)
    ff.testing.check_dataset(CombinedImages.of(data))


@pytest.mark.parametrize("settings", [{"objective": "path"}, {"objective": "marginal"}, {"supervision": "weak"}])
def test_models_train_both_ways(data: TransformedImages, settings: dict) -> None:
    model = ff.models.build_vae((3, 12, 12), 3, 4, hidden=(8, 8), num_frames=5, **settings)
    for batch in data.batches(12):
        k = None if settings.get("supervision") == "weak" else batch["k"]
        terms = model(batch["frames"], batch["t"], k)
        terms.loss.backward()
        assert bool(terms.loss.isfinite())
