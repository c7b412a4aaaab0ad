"""Irregular films: sequences with times of their own, missing frames and different lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flowfactor as ff
from flowfactor import objectives

SHAPE, K, D, B, T = (1, 8, 8), 2, 4, 5, 4
SMALL: dict[str, Any] = {"hidden": (8, 8), "encoder": {"widths": (4,)}, "decoder": {"widths": (4,)}}
STEPS = {"method": "rk4", "step_size": 0.5}
TIGHT = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}


def vae(**settings: Any) -> ff.models.FlowFactorizedVAE:
    torch.manual_seed(0)
    return ff.models.build_vae(SHAPE, K, D, **SMALL | {"solver": STEPS} | settings).double()


def weak(estimator: str = "enumerate", **settings: Any) -> ff.models.FlowFactorizedVAE:
    factor = {"widths": (4,), "hidden": (4,)}
    return vae(supervision="weak", num_frames=T + 1, factor_encoder=factor, estimator=estimator, **settings)


def sparse(**settings: Any) -> ff.models.SparseTransformationVAE:
    torch.manual_seed(0)
    pairs = {"widths": (4,), "hidden": (4,)}
    return ff.models.build_sparse_vae(SHAPE, K, D, pair_encoder=pairs, **SMALL | {"solver": STEPS} | settings).double()


BOUNDS: dict[str, dict[str, Any]] = {
    "path": {},
    "marginal": {"objective": "marginal", "prior": "diffusion"},
    "steered": {"context": 2},
}


@pytest.fixture
def frames(generator: torch.Generator) -> Tensor:
    return torch.rand(B, T + 1, *SHAPE, generator=generator).double()


@pytest.fixture
def _means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Posteriors are drawn at their means, so that a sequence's terms do not depend on its batch."""
    monkeypatch.setattr(
        objectives, "draw", lambda q, samples=(), generator=None: q.mean.expand(*samples, *q.mean.shape)
    )


def k_and_context(rows: Any = slice(None), context: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    given = torch.randn(B, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return (torch.arange(B) % K)[rows], {"context": given[rows]} if context else {}


def terms_and_slopes(model: Any, *arguments: Any, **named: Any) -> dict[str, Tensor]:
    model.zero_grad()
    terms = model(*arguments, generator=torch.Generator().manual_seed(1), **named)
    terms.loss.backward()
    slopes = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**terms.as_dict(), **slopes}


def mean_of(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = {name: value for part in parts for name, value in part.items()}
    # What rests has no gradient for its flow.
    return {
        name: torch.stack([part.get(name, torch.zeros_like(v)) for part in parts]).mean(0) for name, v in names.items()
    }


def alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


LENGTHS = torch.tensor([5, 2, 4, 3, 5])


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("clock", ["own, repeated", "own, going on", "shared"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_padded_sequences_are_as_the_shorter_ones_alone(frames: Tensor, bound: str, clock: str) -> None:
    """Loss, terms and gradients of the batch are the means of those of each sequence alone, without what pads it."""
    mask = torch.arange(T + 1) < LENGTHS[:, None]
    pace = (
        torch.ones(B, 1, dtype=torch.float64)
        if clock == "shared"
        else torch.tensor([[1.0], [0.5], [1], [1.5], [0.5]]).double()
    )
    t = torch.arange(T + 1.0).double() * pace
    given = t.gather(1, torch.minimum(torch.arange(T + 1), LENGTHS[:, None] - 1)) if "repeated" in clock else t
    given = t[0] if clock == "shared" else given
    # Steps per interval are the most that any sequence needs: with the tight solver it makes no difference.
    model = vae(**BOUNDS[bound], solver=STEPS if clock == "shared" else TIGHT)
    filled = frames.masked_fill(~mask[:, :, None, None, None], torch.nan)
    k, context = k_and_context(context=bound == "steered")
    for training in (True, False):
        model.train(training)
        found = terms_and_slopes(model, filled, given, k, mask=mask, **context)
        alone = []
        for n, length in enumerate(LENGTHS.tolist()):
            k, own = k_and_context(slice(n, n + 1), context=bound == "steered")
            alone.append(terms_and_slopes(model, frames[n : n + 1, :length], t[n, :length], k, **own))
        alike(found, mean_of(alone), 1e-6)
        k, context = k_and_context(context=bound == "steered")
    together = model.log_likelihood(filled, given, k, 3, mask=mask, **context)
    for n, length in enumerate(LENGTHS.tolist()):
        k, own = k_and_context(slice(n, n + 1), context=bound == "steered")
        bound_alone = model.log_likelihood(frames[n : n + 1, :length], t[n, :length], k, 3, **own)
        torch.testing.assert_close(together[n], bound_alone[0], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("bound", BOUNDS)
def test_own_times_are_as_each_sequence_alone(frames: Tensor, bound: str) -> None:
    t = torch.arange(T + 1.0).double() * torch.linspace(0.3, 2, B).double()[:, None] + torch.rand(B, 1).double()
    t[2, 3] = t[2, 2]  # it rests for a frame
    model = vae(**BOUNDS[bound], solver=TIGHT)
    k, context = k_and_context(context=bound == "steered")
    found = terms_and_slopes(model, frames, t, k, **context)
    likelihood = model.log_likelihood(frames, t, k, 2, **context)
    made = model.transform(frames[:, 0], t, k, **context)
    alone = []
    for n in range(B):
        k, own = k_and_context(slice(n, n + 1), context=bound == "steered")
        steps = [0, 1, 2, 4] if n == 2 else list(range(T + 1))
        one = model.transform(frames[n : n + 1, 0], t[n, steps], k, **own)[0]
        torch.testing.assert_close(made[n, steps], one, rtol=1e-6, atol=1e-6)
        when = t[n : n + 1] if n == 2 else t[n]  # times that all share do not repeat
        alone.append(terms_and_slopes(model, frames[n : n + 1], when, k, **own))
        bounded = model.log_likelihood(frames[n : n + 1], when, k, 2, **own)[0]
        torch.testing.assert_close(likelihood[n], bounded, rtol=1e-6, atol=1e-6)
    alike(found, mean_of(alone), 1e-6)
    torch.testing.assert_close(made[2, 3], made[2, 2])


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("bound", ["path", "marginal"])
def test_missing_frames_count_for_nothing(frames: Tensor, bound: str) -> None:
    """The reconstruction and the divergence are sums over observed frames, against the path written out."""
    mask = torch.ones(B, T + 1, dtype=torch.bool)
    mask[0, 2] = mask[1, 1:3] = mask[4, 1:4] = False
    t, (k, _) = torch.arange(T + 1.0).double(), k_and_context()
    model = vae(**BOUNDS[bound]).eval()
    terms = model(frames.masked_fill(~mask[:, :, None, None, None], torch.nan), t, k, mask=mask)
    q = model.encode(frames[:, 0])
    path = model.flow(q.mean, t, k, log_det=True)
    log_p = torch.stack([model.decoder(z).log_prob(x) for z, x in zip(path.z, frames.unbind(1), strict=True)])
    torch.testing.assert_close(terms.reconstruction, log_p.mT[mask].sum() / B)
    if bound == "marginal":
        assert path.log_det is not None
        log_q = q.log_prob(q.mean) - path.log_det
        ratio = torch.stack([log_q[s] - model.prior.at(s, k).log_prob(path.z[s]) for s in range(T + 1)])
        torch.testing.assert_close(terms.kl, ratio.mT[mask].sum() / B)
    everything = model(frames, t, k, mask=torch.ones_like(mask))
    assert torch.equal(everything.loss, model(frames, t, k).loss)


MAKERS = {
    "few frames": lambda: vae(frames_per_step=2),
    "marginal": lambda: vae(objective="marginal", prior="diffusion", frames_per_step=2),
    **{name: lambda name=name: weak(name) for name in ("enumerate", "balanced", "gumbel")},
}


@pytest.mark.parametrize("name", MAKERS)
def test_missing_frames_are_never_read(frames: Tensor, name: str) -> None:
    """Whatever they and the times after the last hold, the loss and all gradients stay the same, and finite."""
    mask = torch.ones(B, T + 1, dtype=torch.bool)
    mask[0, 2] = mask[1, 1:3] = mask[3, 1:] = mask[4, 3:] = False
    model = MAKERS[name]()
    k = torch.arange(B) % K if model.supervision == "full" else None
    t = torch.arange(T + 1.0).double().expand(B, -1).clone()
    found = []
    for fill, late in ((0.0, 4.0), (torch.nan, 4.0), (0.7, 9.0), (-torch.inf, torch.nan)):
        holed = frames.masked_fill(~mask[:, :, None, None, None], fill)
        t[3, 1:] = t[4, 3:] = late
        found.append(terms_and_slopes(model.train(), holed, t, k, mask=mask))
        model = MAKERS[name]()
        model.eval().log_likelihood(holed, t, k, 2, mask=mask)
    for other in found:
        assert all(bool(value.isfinite().all()) for value in other.values())
        alike(other, found[0])


def test_one_of_few_frames_is_drawn_without_bias() -> None:
    mask = torch.tensor([[True, False, True, True, True, False], [True, True, False, False, False, False], [True] * 6])
    values = torch.tensor(
        [[1.0, 9.0, 3.0, 5.0, 2.0, 9.0], [4.0, 2.0, 9.0, 9.0, 9.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    )
    total, g = torch.zeros(3), torch.Generator().manual_seed(0)
    for _ in range(4000):
        index, weight = objectives.choose_observed_frames(mask, 2, g)
        assert index.shape == weight.shape == (2, 3)
        assert bool(mask.mT.gather(0, index).all())
        total += (weight * values.mT.gather(0, index)).sum(0)
    expected = (mask * values).sum(1)
    assert torch.allclose(total / 4000, expected, rtol=0.03)
    index, weight = objectives.choose_observed_frames(mask, None)
    assert index.shape == (6, 3)
    torch.testing.assert_close((weight * values.mT.gather(0, index)).sum(0), expected)
    torch.testing.assert_close(total[1] / 4000, expected[1])  # no more frames than are wanted: nothing is drawn


@pytest.mark.usefixtures("_means")
def test_inferred_factors_are_expectations_over_those_that_are_given(frames: Tensor) -> None:
    """Of irregular films with a context: q(k|x) of what was observed, and the terms of each k as where it is told."""
    mask = torch.arange(T + 1) < LENGTHS[:, None]
    mask[0, 2] = mask[4, 1] = False
    t = torch.arange(T + 1.0).double() * torch.linspace(0.5, 2, B).double()[:, None]
    _, context = k_and_context(context=True)
    model = weak(context=2, solver=TIGHT).eval()
    holed = frames.masked_fill(~mask[:, :, None, None, None], torch.nan)
    found = model(holed, t, mask=mask, **context)
    q = model.infer_factor(holed, mask=mask)
    given = model._checked(holed, t, mask=mask, **context)
    told = [model._solved(given, k, model._begin(given, k, None), None) for k in range(K)]
    for name in ("reconstruction", "kl", "hj", "start"):
        each = torch.stack([getattr(terms, name) for terms in told], 1)
        torch.testing.assert_close(getattr(found, name), (q.probs * each).sum(1).mean(), rtol=1e-6, atol=1e-8)
    prior = torch.full((K,), 1 / K).double()
    torch.testing.assert_close(found.kl_factor, (q.probs * (q.probs / prior).log()).sum(1).mean())
    judged = model._judge(given, model._begin(given, 0, None), None, None)
    path = torch.stack([model._path(given, model._begin(given, k, None), k, None)[0].z for k in range(K)])
    seen = mask.mT.clone()
    seen[0] = False  # the first frame is the same under all flows
    log_p = torch.stack([model.decoder(path[:, s]).log_prob(given.frames[:, s]) for s in range(T + 1)], 1)
    expected = torch.stack([terms.kl for terms in told], 1) - torch.where(seen, log_p, 0).sum(1).mT
    torch.testing.assert_close(judged, expected, rtol=1e-6, atol=1e-6)


def test_what_is_inferred_sees_the_last_observed_frame(frames: Tensor) -> None:
    model = weak().eval()
    mask = torch.ones(B, T + 1, dtype=torch.bool)
    mask[:, 2] = False
    shown = frames.clone()
    shown[:, 2] = frames[:, 1]
    holed = frames.masked_fill(~mask[:, :, None, None, None], torch.nan)
    torch.testing.assert_close(model.infer_factor(holed, mask=mask).probs, model.infer_factor(shown).probs)


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("control", ["single", "double"])
def test_sparse_weights_follow_own_times(frames: Tensor, control: str) -> None:
    t = torch.arange(T + 1.0).double() * torch.linspace(0.5, 2, B).double()[:, None]
    model = sparse(warmup_steps=0, control=control, solver=TIGHT).eval()
    found = model(frames, t, generator=torch.Generator().manual_seed(0))
    assert bool(found.loss.isfinite() & (found.hj > 0))
    weights = model.infer_weights(frames).mean
    path = model._along(model.encode(frames[:, 0]).mean, t.mT, weights, None, None, model._costs(1))
    for n in range(B):
        z0 = model.encode(frames[n : n + 1, 0]).mean
        alone = model._along(z0, t[n], weights[n : n + 1], None, None, model._costs(1))
        torch.testing.assert_close(path.z[:, n], alone.z[:, 0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(path.costs["hj"][:, n], alone.costs["hj"][:, 0], rtol=1e-6, atol=1e-7)
    model.log_likelihood(frames, t, samples=2)
    warming = sparse(warmup_span=2).train()
    warming(frames, t).loss.backward()
    with pytest.raises(ValueError, match="switches at times that all sequences share"):
        model.schedule(weights, t)


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("control", ["single", "double"])
def test_sparse_weights_of_padded_sequences_are_those_of_the_shorter_ones(
    frames: Tensor, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rsample = ff.encoders.SparseWeights.rsample

    def at_means(q: Any, sample_shape: tuple[int, ...] = (), **_: Any) -> Any:
        parts = (q.spike_probs, q.slab.mean, q.mean)
        return type(rsample(q))(*(part.expand(*sample_shape, *part.shape) for part in parts))

    monkeypatch.setattr(ff.encoders.SparseWeights, "rsample", at_means)
    lengths = LENGTHS.clone()
    lengths[3] = 1  # and one of its first frame alone, of which no interval counts
    mask = torch.arange(T + 1) < lengths[:, None]
    t = torch.arange(T + 1.0).double() * torch.linspace(0.5, 2, B).double()[:, None]
    padded = frames.masked_fill(~mask[:, :, None, None, None], torch.nan)
    model = sparse(warmup_steps=0, control=control, solver=TIGHT)
    model.eval()  # whose unit does not follow the batch
    found = terms_and_slopes(model, padded, t, mask=mask)
    together = model.log_likelihood(padded, t, samples=2, mask=mask)
    alone = []
    for n, length in enumerate(lengths.tolist()):
        own = max(length, 2)  # one frame alone has no pair: it is padded by one
        seen = mask[n : n + 1, :own]
        alone.append(terms_and_slopes(model, frames[n : n + 1, :own], t[n : n + 1, :own], mask=seen))
        one = model.log_likelihood(frames[n : n + 1, :own], t[n : n + 1, :own], samples=2, mask=seen)
        torch.testing.assert_close(together[n], one[0], rtol=1e-6, atol=1e-6)
    alike(found, mean_of(alone), 1e-6)
    assert float(alone[3]["kl_factor"]) == 0 and float(alone[3]["hj"]) == 0


def test_sparse_weights_are_inferred_from_the_last_observed_frames(frames: Tensor) -> None:
    mask = torch.ones(B, T + 1, dtype=torch.bool)
    mask[:, 2] = False
    shown = frames.clone()
    shown[:, 2] = frames[:, 1]
    model = sparse(warmup_steps=0).eval()
    found = model(frames, torch.arange(T + 1.0).double(), mask=mask).kl_factor
    torch.testing.assert_close(found, model.weights_prior.kl(model.infer_weights(shown)).mean())


@pytest.mark.parametrize("warmup", [{"warmup_steps": 0}, {}, {"warmup_span": 2}])
def test_sparse_models_never_read_missing_frames(frames: Tensor, warmup: dict[str, Any]) -> None:
    mask = torch.ones(B, T + 1, dtype=torch.bool)
    mask[0, 2] = mask[1, 1:3] = mask[3, 1:] = mask[4, 3:] = False
    found = []
    for fill in (0.5, torch.nan):
        holed = frames.masked_fill(~mask[:, :, None, None, None], fill)
        model = sparse(**warmup).train()
        found.append(terms_and_slopes(model, holed, torch.arange(T + 1.0).double(), mask=mask))
        found[-1]["unit"] = model.unit.clone()
    assert all(bool(value.isfinite().all()) for value in found[1].values())
    alike(found[1], found[0])


def test_what_does_not_fit_is_refused(frames: Tensor) -> None:
    t, k, model = torch.arange(T + 1.0).double(), torch.arange(B) % K, vae()
    mask = torch.ones(B, T + 1, dtype=torch.bool)
    late = mask.clone()
    late[3, 0] = False
    with pytest.raises(ValueError, match="the first frame of sequence 3 is missing"):
        model(frames, t, k, mask=late)
    with pytest.raises(TypeError, match="mask must be a tensor of booleans"):
        model(frames, t, k, mask=mask.long())
    with pytest.raises(ValueError, match=r"mask must have an entry a frame, shape \[5, 5\], got \[5, 4\]"):
        model(frames, t, k, mask=mask[:, 1:])
    with pytest.raises(ValueError, match=r"shape \[5\], or those of each sequence, \[5, 5\]; got \[4, 5\]"):
        model(frames, t.expand(B - 1, -1), k)
    with pytest.raises(ValueError, match=r"those of each of the images \[5, 'T'\]; got shape \[4, 3\]"):
        model.transform(frames[:, 0], torch.rand(4, 3).double(), 0)


class Flat(objectives.Objective):
    """A bound of an objective that knows nothing of missing frames."""

    def divergence(self, start, prior, path, t, control):
        return start


def test_an_objective_says_what_missing_frames_count(frames: Tensor) -> None:
    t, k, model = torch.arange(T + 1.0).double(), torch.arange(B) % K, vae(objective=Flat())
    hole = torch.ones(B, T + 1, dtype=torch.bool)
    model(frames, t, k, mask=hole)
    hole[0, 2] = False
    with pytest.raises(
        ValueError, match="objective Flat does not say what a missing frame counts: give the method divergence"
    ):
        model(frames, t, k, mask=hole)


def films(frames: Tensor, **beside: Any) -> ff.data.Sequences:
    return ff.data.Sequences(frames.float(), torch.arange(len(frames)) % K, **beside)


@pytest.mark.usefixtures("_means")
def test_measures_of_irregular_films(frames: Tensor) -> None:
    """Sums over observed frames, by the times of each; whatever the missing frames hold."""
    lengths = LENGTHS
    mask = torch.arange(T + 1) < lengths[:, None]
    t = torch.arange(T + 1.0) * torch.linspace(0.5, 2, B)[:, None]
    model = vae(solver={"method": "dopri5"}, augment_dim=0).float().eval()
    data = films(frames, t=t, mask=mask)  # three of one class and two of the other
    batch = data.batch(range(B))
    made = model.transform(batch["frames"][:, 0], batch["t"], batch["k"])
    error = (mask[:, :, None, None, None] * (batch["frames"] - made)).abs()[:, 1:].flatten(1).sum(1)
    expected = torch.stack([error[batch["k"] == flow].mean() for flow in range(K)])
    found = ff.metrics.equivariance_error(model, data)
    torch.testing.assert_close(found.mean, expected)
    assert found.count == 2
    assert bool(ff.metrics.latent_equivariance_error(model, data).mean.isfinite().all())
    bound = ff.metrics.log_likelihood(model, data, samples=2, generator=torch.Generator().manual_seed(0))
    each = model.log_likelihood(
        batch["frames"], batch["t"], batch["k"], 2, mask=batch["mask"], generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(torch.tensor(bound.per_frame), (each / lengths).mean().detach())
    assert ff.metrics.paper_log_likelihood(model, data).count == B
    with pytest.raises(ValueError, match=r"compares all frames, and the mask says that \d are missing"):
        ff.metrics.latent_traversal_error(model, data, data)
    pytest.importorskip("scipy", reason="needs the extra data")
    assert ff.metrics.match_flows(weak().float(), data).accuracy.count == B
