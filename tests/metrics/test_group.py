"""Orders of flows, halves of times, and ways back: against linear flows, of which all is known."""

from __future__ import annotations

import json

import pytest
import torch

import flowfactor as ff
from flowfactor.metrics import commutator_error, group_error

PIXELS = 16
SPAN = 4.0


def data_of(count: int = 6, **more) -> ff.data.Sequences:
    return ff.data.Sequences(torch.rand(count, int(SPAN) + 1, 1, 4, 4), **more)


def turned(model, *parts):
    """A model whose latents are its pixels, along flows ``v_k = v(z, t)``."""
    model.flow = ff.LatentFlow(ff.fields.from_module(list(parts), PIXELS), ff.Solver(rtol=1e-6, atol=1e-6))
    return model


def matrices(count: int = 3) -> torch.Tensor:
    return 0.1 * torch.randn(count, PIXELS, PIXELS)


def linear(matrix: torch.Tensor):
    return lambda z, t: z @ matrix.mT


@pytest.mark.parametrize("space", ["latents", "frames"])
def test_orders_of_linear_flows(pixel_model, space) -> None:
    data, each = data_of(), matrices()
    model = turned(pixel_model(3), *map(linear, each))
    found = commutator_error(model, data, space=space, batch_size=4)
    z, maps = data.batch(range(6))["frames"][:, 0].flatten(1), torch.linalg.matrix_exp(SPAN * each)
    p = 2 if space == "latents" else 1
    for value, (i, j) in zip(found.mean, found.pairs, strict=True):
        ends = [z @ (maps[a] @ maps[b]).mT for a, b in ((i, j), (j, i))]
        way = sum((end - z).norm(p, -1).mean() for end in ends) / 2
        torch.testing.assert_close(value, (ends[0] - ends[1]).norm(p, -1).mean() / way, rtol=1e-4, atol=1e-4)
    assert found.pairs == ((0, 1), (0, 2), (1, 2)) and found.count == 6 and float(found.mean.min()) > 0.05
    assert bool((found.standard_error > 0).all()) and bool((found.low < found.mean).all())
    chosen = commutator_error(model, data, pairs=[(2, 1)], space=space)
    torch.testing.assert_close(chosen.mean, found.mean[2:], rtol=1e-4, atol=1e-5)


def test_what_commutes_is_seen_to(pixel_model) -> None:
    """Functions of one matrix; and turns of different coordinates, which each alone move a lot."""
    one = matrices(1)[0]
    found = commutator_error(turned(pixel_model(3), *map(linear, (one, one @ one, one.matrix_power(3)))), data_of())
    assert float(found.mean.max()) < 1e-4


def test_the_span_is_that_of_the_data_or_as_given(pixel_model) -> None:
    model, data = turned(pixel_model(2), *map(linear, matrices(2))), data_of()
    torch.testing.assert_close(commutator_error(model, data, span=SPAN).mean, commutator_error(model, data).mean)
    # For short times it is s |[v_i, v_j]| over |v_i + v_j|.
    z, s = data.batch(range(6))["frames"][:, 0].flatten(1), 1e-2
    bracket = ff.regularizers.Commutator()(model.flow, z).sqrt().mean()
    moved = (model.flow.velocity(z, 0.0, 0) + model.flow.velocity(z, 0.0, 1)).norm(dim=-1).mean()
    torch.testing.assert_close(commutator_error(model, data, span=s).mean[0], s * bracket / moved, rtol=2e-2, atol=0)


def test_fields_without_time_are_groups_and_others_are_not(pixel_model) -> None:
    r"""v = a(t) z with a = 0.1 t: $\phi_s z = e^{s^2/20} z$, forth and back alike."""
    data = data_of(4)
    model = turned(pixel_model(2), linear(matrices(1)[0]), lambda z, t: 0.1 * t.unsqueeze(-1) * z)
    found = group_error(model, data, batch_size=3)
    whole, half = (torch.tensor(s * s / 20).exp() for s in (SPAN, SPAN / 2))
    known = ((whole - half**2) / (whole - 1), (whole**2 - 1) / (whole - 1))
    for figure, value in zip((found.addition, found.inverse), known, strict=True):
        assert float(figure.mean[0]) < 1e-4
        torch.testing.assert_close(figure.mean[1], value, rtol=1e-4, atol=1e-4)
        assert figure.count == 4
    json.dumps(found.as_dict())


def test_what_the_way_back_costs_in_frames(pixel_model) -> None:
    """Reconstructions that miss every pixel by 0.1; v = t / 200 comes back 0.08 a pixel off, where it went 0.04 far."""
    drift = [lambda z, t: torch.ones_like(z) * 0.01, lambda z, t: t.unsqueeze(-1) / 200 * torch.ones_like(z)]
    model = turned(pixel_model(2), *drift)
    decode = model.decode
    model.decode = lambda z: decode(z) + 0.1
    found = group_error(model, data_of(), space="frames")
    assert found.reconstruction is not None and found.space == "frames"
    torch.testing.assert_close(found.reconstruction.mean, torch.tensor([1.0, 1.8]), rtol=1e-4, atol=1e-4)
    assert found.inverse.mean.tolist() == pytest.approx([0, 2], abs=1e-3)


def test_a_limit_draws_the_same_each_time(pixel_model) -> None:
    model, data = turned(pixel_model(2), *map(linear, matrices(2))), data_of(20)
    for metric in (commutator_error, group_error):
        first, again, other = (metric(model, data, limit=5, seed=seed).as_dict() for seed in (1, 1, 2))
        assert first == again
        assert str(first) != str(other)
    assert commutator_error(model, data, limit=5).count == 5


def test_data_have_names_times_and_contexts(pixel_model) -> None:
    model = turned(pixel_model(2), *map(linear, matrices(2)))
    frames, k = torch.rand(6, 3, 1, 4, 4), torch.arange(6) % 2
    named = ff.data.Sequences(frames, k, flow_names=["grow", "turn"])
    assert commutator_error(model, named).as_dict()["pairs"] == [["grow", "turn"]]
    own = ff.data.Sequences(frames, k, t=torch.tensor([[0.0, 1.0, 2.0]] * 6) * torch.linspace(1, 2, 6)[:, None])
    alone = [
        commutator_error(model, ff.data.Sequences(frames[i : i + 1], k[:1] * 0), span=float(own.batch([i])["t"][0, -1]))
        for i in range(6)
    ]
    found = commutator_error(model, own)
    assert float(min(a.mean for a in alone)) < float(found.mean) < float(max(a.mean for a in alone))
    assert commutator_error(model, own, span=1.0).mean == pytest.approx(commutator_error(model, named, span=1.0).mean)


@pytest.mark.parametrize(
    ("also", "match"),
    [
        ({"span": 0.0}, "span"),
        ({"span": float("nan")}, "span"),
        ({"space": "pixels"}, 'space must be "latents" or "frames"'),
        ({"limit": 0}, "limit"),
        ({"pairs": [(0, 2)]}, "flows of 0 to 1"),
        ({"pairs": []}, "at least one"),
        ({"pairs": [(1, 1)]}, "two different flows"),
    ],
)
def test_what_does_not_fit_is_refused(pixel_model, also, match) -> None:
    with pytest.raises(ValueError, match=match):
        commutator_error(pixel_model(2), data_of(), **also)
    if "pairs" not in also:
        with pytest.raises(ValueError, match=match):
            group_error(pixel_model(2), data_of(), **also)


def test_what_cannot_be_measured_is_named(pixel_model) -> None:
    with pytest.raises(ValueError, match="the model has one alone"):
        commutator_error(pixel_model(1), data_of())
    still = turned(pixel_model(2), *[lambda z, t: torch.zeros_like(z)] * 2)
    with pytest.raises(ValueError, match="flows 0 and 1 move nothing"):
        commutator_error(still, data_of())
    with pytest.raises(ValueError, match="flow 0 moves nothing"):
        group_error(still, data_of())

    class Codes:
        num_flows, encode = 2, pixel_model().encode

    for metric in (commutator_error, group_error):
        with pytest.raises(ff.metrics.NoLatentFlowError, match="a Codes has no latent flow"):
            metric(Codes(), data_of())
    with pytest.raises(ValueError, match="a Codes has no decode"):
        group_error(Codes(), data_of(), space="frames")


def test_models_that_find_flows_themselves_are_measured_as_they_are_named() -> None:
    data = ff.data.Sequences(torch.rand(4, 3, 1, 8, 8), torch.arange(4) % 2)
    model = ff.models.build_sparse_vae((1, 8, 8), 2, 4, hidden=(8, 8))
    matched = ff.metrics.MatchedModel(model, torch.tensor([1, 0]))
    one, other = (group_error(m, data) for m in (model, matched))
    torch.testing.assert_close(one.inverse.mean, other.inverse.mean.flip(0))
    torch.testing.assert_close(commutator_error(model, data).mean, commutator_error(matched, data).mean)
