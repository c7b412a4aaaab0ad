"""Any frame of a sequence encoded in training: the bounds in closed form, what is drawn, and what stays as it was."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import flowfactor as ff
from flowfactor.models import flow_vae
from flowfactor.models.inputs import Inputs
from flowfactor.models.reference import reference_frame, without

T, B, K = 4, 6, 2
F64 = torch.float64
STEPS = {"method": "rk4", "step_size": 0.5}


def vae(reference: str = "random", **settings: Any) -> ff.models.FlowFactorizedVAE:
    torch.manual_seed(0)
    small = {"hidden": (8, 8), "encoder": {"widths": (4,)}, "decoder": {"widths": (4,)}, "solver": STEPS}
    return ff.models.build_vae((1, 8, 8), K, 4, reference=reference, **small | settings).double()


def weak(estimator: str, reference: str = "random") -> ff.models.FlowFactorizedVAE:
    factor = {"widths": (4,), "hidden": (4,)}
    return vae(reference, supervision="weak", num_frames=T + 1, factor_encoder=factor, estimator=estimator)


def films() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(B, T + 1, 1, 8, 8, generator=g).double(), torch.arange(T + 1), torch.arange(B) % K


def always(monkeypatch: pytest.MonkeyPatch, frame: int | Tensor) -> None:
    monkeypatch.setattr(flow_vae, "reference_frame", lambda given, generator=None: frame)


class Affine(nn.Module):
    """Encodes a frame of two values, or decodes a state of two: a normal around an affine map, with independent noise."""

    def __init__(self, scale: list[float], event: tuple[int, ...], seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.w, self.b = torch.randn(2, 2, generator=g, dtype=F64), torch.randn(2, generator=g, dtype=F64) / 4
        self.scale, self.event = torch.tensor(scale, dtype=F64), event

    def forward(self, x: Tensor) -> Independent:
        x = x if self.event == (2,) else x.unsqueeze(-2).unsqueeze(-2)
        x = x.flatten(-3) if self.event == (2,) else x
        mean = x @ self.w.mT + self.b
        return Independent(Normal(mean, self.scale.expand_as(mean)), len(self.event))


S = torch.tensor([[0.3, 0.1], [0.1, -0.2]], dtype=F64)


def linear(objective: str) -> tuple[ff.models.FlowFactorizedVAE, Affine, Affine]:
    encoder, decoder = Affine([0.3, 0.5], (2,), 0), Affine([0.4, 0.6], (1, 1, 2), 1)
    flow = ff.LatentFlow(ff.potentials.QuadraticPotential(2, S=S).double(), ff.Solver(rtol=1e-8, atol=1e-8))
    prior = ff.priors.Diffusion(ff.priors.StandardNormal(2), num_flows=1, init=0.2).double()
    how: dict[str, Any] = {"hj_weight": 0.0, "start_weight": 0.0, "objective": objective, "reference": "random"}
    return ff.models.FlowFactorizedVAE(encoder, decoder, flow, prior, **how), encoder, decoder


@pytest.mark.parametrize("objective", ["path", "marginal"])
def test_the_bounds_of_a_linear_gaussian_model(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is the log-likelihood less the divergence of the posterior from the true one, both in closed form.

    Under `path` of the model whose prior is that of the state at the reference frame: the mean of the bounds is one of the
    mixture of these. Under `marginal` of one model, whichever the frame.
    """
    model, encoder, decoder = linear(objective)
    t, x = torch.tensor([0.0, 0.5, 1.5], dtype=F64), torch.tensor([[0.2, -0.3], [0.8, 0.1], [0.5, 0.9]], dtype=F64)
    count, noise = 20_000, decoder.scale.square().diag()
    frames = x.reshape(1, 3, 1, 1, 2).expand(count, -1, -1, -1, -1)
    bounds, likelihoods = [], []
    for r in range(3):
        always(monkeypatch, r)
        g = torch.Generator().manual_seed(r)
        given = model._checked(frames, t)
        terms = model._solved(given, 0, model._begin(given, 0, g), g)
        each = (terms.reconstruction - terms.kl).detach()
        mean, cov = encoder(x[r].reshape(1, 1, 2)).mean, encoder.scale.square().diag()
        moves = torch.matrix_exp((t - t[r])[:, None, None] * S)  # from the reference frame to each
        if objective == "path":
            flat = (decoder.w @ moves).reshape(6, 2)
            p = _observed(flat, decoder.b.repeat(3), torch.block_diag(noise, noise, noise), torch.eye(2, dtype=F64))
            marginal, posterior = p(x.flatten())
            log_p, gap = marginal, kl_divergence(MultivariateNormal(mean, cov), posterior)
        else:
            log_p, gap = torch.zeros((), dtype=F64), torch.zeros((), dtype=F64)
            for i in range(3):
                p = _observed(decoder.w, decoder.b, noise, (1 + 2 * 0.2 * t[i]) * torch.eye(2, dtype=F64))
                marginal, posterior = p(x[i])
                q = MultivariateNormal(moves[i] @ mean, moves[i] @ cov @ moves[i].mT)
                log_p, gap = log_p + marginal, gap + kl_divergence(q, posterior)
        error = 5 * float(each.std()) / math.sqrt(count)
        assert float(each.mean()) == pytest.approx(float(log_p - gap), abs=error)
        bounds.append(log_p - gap)
        likelihoods.append(log_p)
    mixture = torch.stack(likelihoods).logsumexp(0) - math.log(3)
    assert torch.stack(bounds).mean() < mixture
    if objective == "marginal":
        torch.testing.assert_close(torch.stack(likelihoods), mixture.expand(3))


def _observed(w: Tensor, b: Tensor, noise: Tensor, prior: Tensor) -> Any:
    """The density of x = w z + b + noise with z ~ N(0, prior), and the posterior of z."""

    def of(x: Tensor) -> tuple[Tensor, MultivariateNormal]:
        cov = w @ prior @ w.mT + noise
        gain = prior @ w.mT @ cov.inverse()
        after = prior - gain @ w @ prior
        return MultivariateNormal(b, cov).log_prob(x), MultivariateNormal(gain @ (x - b), (after + after.mT) / 2)

    return of


def test_each_frame_is_as_likely_as_any_other() -> None:
    frames, t, _ = films()
    g = torch.Generator().manual_seed(0)
    drawn = Counter(reference_frame(Inputs(frames, t), g) for _ in range(2_000))
    assert sorted(drawn) == list(range(T + 1))
    assert all(abs(count - 400) < 5 * math.sqrt(2_000 * 0.16) for count in drawn.values())
    mask = torch.tensor([[True, True, False, False, True], [True, False, False, False, False]])
    some = torch.stack([torch.as_tensor(reference_frame(Inputs(frames[:2], t, mask=mask), g)) for _ in range(1_500)])
    assert bool((some[:, 1] == 0).all())
    counts = torch.bincount(some[:, 0], minlength=T + 1)
    assert counts[~mask[0]].tolist() == [0, 0]
    assert bool(((counts[mask[0]] - 500).abs() < 5 * math.sqrt(1_500 * 2 / 9)).all())


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("frame", [0, 2, T, torch.tensor([3, 0, 1, 4, 4, 2])], ids=["first", "inner", "last", "each"])
def test_the_terms_of_a_step(frame: Any, down: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the path that is solved from the reference frame, here by two plain solves for each sequence."""
    model = vae(hj_weight=2.0, start_weight=3.0, kl_weight=0.5)
    (x, t, k), hj = films(), model.hamilton_jacobi
    t = t.flip(0) if down else t
    always(monkeypatch, frame)
    monkeypatch.setattr(ff.objectives, "draw", lambda q, samples=(), generator=None: q.mean)
    terms = model(x, t, k)
    found = []
    for i, r in enumerate(torch.as_tensor(frame).expand(B).tolist()):
        q, of = model.encode(x[i : i + 1, r]), int(k[i])
        on = model.flow(q.mean, t[r:], of, costs={"hj": hj})
        back = model.flow(q.mean, t[: r + 1].flip(0), of, costs={"hj": hj})
        z = torch.cat([back.z.flip(0)[:-1], on.z])
        log_p = model.decoder(z[:, 0]).log_prob(x[i]).sum()
        start = ff.regularizers.StartAtRest()(model.flow, z[0], of, t[0].double())
        found.append(
            [
                log_p,
                ff.objectives.start_divergence(q, model.prior, q.mean, of),
                (back.costs["hj"][-1] + on.costs["hj"][-1]) / T,
                start,
            ]
        )
    log_p, kl, residual, start = (
        torch.stack([torch.as_tensor(x).reshape(()) for x in col]).mean() for col in zip(*found, strict=True)
    )
    torch.testing.assert_close(terms.reconstruction, log_p)
    torch.testing.assert_close(terms.kl, kl)
    torch.testing.assert_close(terms.hj, residual)
    torch.testing.assert_close(terms.start, start)
    assert residual > 0
    torch.testing.assert_close(terms.loss, -log_p + 0.5 * kl + 2 * residual + 3 * start)


def test_evaluation_encodes_the_first_frame() -> None:
    (x, t, k), random, first = films(), vae(), vae("first")
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    for a, b in zip(
        _values(random.eval()(x, t, k, generator=seeded[0])), _values(first(x, t, k, generator=seeded[1])), strict=True
    ):
        assert torch.equal(a, b)
    many = [m.train().log_likelihood(x, t, k, 4, generator=torch.Generator().manual_seed(3)) for m in (random, first)]
    assert torch.equal(*many)


def _values(terms: ff.models.Terms) -> list[Tensor]:
    return [terms.loss, terms.reconstruction, terms.kl, terms.hj, terms.start]


def test_steps_are_drawn_from_the_generator() -> None:
    model, batch = vae(), films()
    one, other = (
        [float(model(*batch, generator=g).loss.detach()) for _ in range(4)]
        for g in (torch.Generator().manual_seed(7), torch.Generator().manual_seed(7))
    )
    assert one == other
    assert len(set(one)) == 4


@pytest.mark.parametrize("objective", ["path", "marginal"])
@pytest.mark.parametrize("own_times", [False, True])
def test_only_observed_frames_are_encoded(objective: str, own_times: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sequence from one of its own; what is in the others never matters, and short ones have their own terms."""
    model = vae(objective=objective, solver={"method": "dopri5", "rtol": 1e-8, "atol": 1e-8})
    x, t, k = films()
    t = t * torch.linspace(0.5, 1.5, B).unsqueeze(1) if own_times else t
    mask = torch.arange(T + 1) < torch.tensor([5, 3, 1, 4, 5, 2]).unsqueeze(1)
    frame = torch.tensor([4, 1, 0, 2, 0, 1])
    always(monkeypatch, frame)
    monkeypatch.setattr(ff.objectives, "draw", lambda q, samples=(), generator=None: q.mean)
    holed = x.masked_fill(~mask[..., None, None, None], torch.nan)
    loss = model(holed, t, k, mask=mask).loss
    each = []
    for i, n in enumerate(mask.sum(1).tolist()):
        always(monkeypatch, int(frame[i]))
        when = (t[i] if own_times else t)[:n]
        each.append(model(x[i : i + 1, :n], when, k[i : i + 1]).loss)
    torch.testing.assert_close(loss, torch.stack(each).mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ["balanced", "gumbel", "enumerate"])
def test_inferred_factors_of_any_reference(estimator: str) -> None:
    model, (x, t, _) = weak(estimator), films()
    for _ in range(3):
        terms = model(x, t)
        terms.loss.backward()
        assert bool(torch.isfinite(terms.loss))
    assert [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())] == []


@pytest.mark.parametrize("frame", [0, 3, torch.tensor([3, 0, 1, 4, 4, 2])], ids=["first", "inner", "each"])
def test_flows_are_judged_by_the_other_frames(frame: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference frame is the same under all flows, and tells none from another."""
    model, (x, t, _) = weak("balanced"), films()
    always(monkeypatch, frame)
    monkeypatch.setattr(ff.objectives, "draw", lambda q, samples=(), generator=None: q.mean)
    given = model._checked(x, t)
    begin = model._begin(given, 0, None)
    paths = [model._path(given, begin, k, None)[0].z for k in range(K)]
    index = torch.as_tensor(frame).expand(B)
    for path in paths:
        assert torch.equal(path[index, torch.arange(B)], begin.z)
    other = (torch.arange(T + 1).unsqueeze(1) != index).mT
    wanted = [
        begin.start
        - (torch.stack([model.decoder(z).log_prob(f) for z, f in zip(path, x.unbind(1), strict=True)]).mT * other).sum(
            1
        )
        for path in paths
    ]
    torch.testing.assert_close(model._judge(given, begin, None, None), torch.stack(wanted, 1))
    assert without(given, frame).mask is not None


def test_room_at_rest_is_at_rest_at_the_reference_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, t, k) = vae(augment_dim=3, augment_scale=0.01, field="gradient"), films()
    always(monkeypatch, 2)
    given = model._checked(x.repeat(50, 1, 1, 1, 1), t)
    begin = model._begin(given, k.repeat(50), None)
    path, kl = model._path(given, begin, k.repeat(50), None)
    assert float(path.z[2, :, 4:].std().detach()) == pytest.approx(0.01, rel=0.2)
    q = model.encode(given.frames[:, 2])
    code = Independent(Normal(q.mean[:, :4], q.stddev[:, :4]), 1)
    expected = kl_divergence(code, Independent(Normal(torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64)), 1))
    torch.testing.assert_close(kl, expected)


@pytest.mark.parametrize("objective", ["path", "marginal"])
def test_every_parameter_learns(objective: str) -> None:
    model = vae(objective=objective, prior="diffusion" if objective == "marginal" else "normal")
    for _ in range(3):
        model(*films()).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_transformation_goes_below_time_zero_and_back() -> None:
    model, (x, _, k) = vae(solver={"method": "dopri5", "rtol": 1e-8, "atol": 1e-8}).eval(), films()
    with torch.no_grad():
        back = model.transform(x[:, 2], [0, -1, -2], k)
        assert back.shape == (B, 3, 1, 8, 8)
        z = model.path(model.encode(x[:, 2]).mean, [0, -1, -2], k)
        there = model.path(z[-1], [-2, -1, 0], k)
    torch.testing.assert_close(back, model.decode(z).movedim(0, 1))
    torch.testing.assert_close(there, z.flip(0), rtol=1e-5, atol=1e-5)


def test_refused() -> None:
    class Own(ff.objectives.Objective):
        def divergence(self, start: Tensor, prior: Any, path: ff.FlowPath, t: Tensor, control: Any) -> Tensor:
            return start

    with pytest.raises(ValueError, match='reference must be "first" or "random", got \'last\''):
        vae("last")
    with pytest.raises(ValueError, match=r'reference="random" encodes any frame.*any_reference = True'):
        vae(objective=Own())
    assert vae("first", objective=Own()).reference == "first"

    class Able(Own):
        any_reference = True

    assert vae(objective=Able()).reference == "random"


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = vae()
    model.save_pretrained(tmp_path)
    assert ff.models.FlowFactorizedVAE.from_pretrained(tmp_path).reference == "random"
    assert model.config()["settings"]["reference"] == "random"


def test_all_flows_of_a_sequence_begin_at_its_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of films with missing frames, where each begins at its own: as where k is told."""
    model, (x, t, _) = weak("enumerate"), films()
    mask = torch.ones(B, T + 1, dtype=torch.bool)
    mask[1, 2] = mask[3, 4] = False
    always(monkeypatch, torch.tensor([3, 0, 1, 2, 4, 2]))
    given = model._checked(x, t, mask=mask)
    begin = model._begin(given, 0, None)
    table = model._all_flows(given, torch.full((B, K), -math.log(K), dtype=F64), begin, None)
    for k in range(K):
        told = model._solved(given, k, begin, None)
        for name in ("reconstruction", "kl", "hj", "start"):
            torch.testing.assert_close(getattr(table, name)[:, k], getattr(told, name))
