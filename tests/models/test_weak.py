"""Weak supervision: q(k|x) per sample, its estimators, their schedules and files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import flowfactor as ff
from flowfactor import objectives
from flowfactor.models import BalancedEstimator, GumbelEstimator, SequenceTerms, balanced_responsibilities
from flowfactor.models.estimators import ESTIMATORS, factor_divergence, truncate

STEPS = {"method": "euler", "step_size": 1.0}  # whatever else is in the batch


def _model(estimator="balanced", **settings):
    torch.manual_seed(0)
    return ff.models.build_vae(
        (1, 8, 8),
        3,
        4,
        hidden=(8, 8),
        supervision="weak",
        num_frames=4,
        estimator=estimator,
        **{"solver": STEPS, **settings},
    )


def _batch(size: int = 6):
    return torch.rand(size, 4, 1, 8, 8), torch.arange(4)


def _sharpened(model):
    """Makes q(k|x) clearly different from sample to sample."""
    with torch.no_grad():
        model.factor_encoder.head.weight *= 60
    return model


@pytest.mark.parametrize("objective", ["path", "marginal"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_parameter_learns(estimator: str, objective: str) -> None:
    prior = "diffusion" if objective == "marginal" else "normal"
    model = _model(estimator, objective=objective, prior=prior, frames_per_step=2)
    model(*_batch(16)).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("objective", ["path", "marginal"])
def test_enumeration_is_the_exact_expectation(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one supervised call for every sample and flow, in value and gradient."""
    monkeypatch.setattr(objectives, "draw", lambda q, *_, **__: q.mean)
    p = [0.2, 0.3, 0.5]
    model = _sharpened(_model({"name": "enumerate", "prune": 0.0}, objective=objective, factor_prior=p, kl_weight=0.5))
    frames, t = _batch(4)
    q = model.infer_factor(frames)
    expected, bound = torch.zeros(()), torch.zeros(())
    for i in range(4):
        for k in range(3):
            each = model(frames[i : i + 1], t, k)
            ratio = q.probs[i, k].log() - math.log(p[k])
            expected = expected + q.probs[i, k] * (each.loss + ratio) / 4
            bound = bound + q.probs[i, k] * (each.bound - ratio) / 4
    terms = model(frames, t)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(terms.bound, bound, rtol=1e-5, atol=1e-3)
    parameters = list(model.parameters())
    wanted, found = (torch.autograd.grad(loss, parameters) for loss in (expected, terms.loss))
    for name, a, b in zip(dict(model.named_parameters()), wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_evaluation_is_exact_whatever_the_estimator(estimator: str) -> None:
    frames, t = _batch()
    made = [_sharpened(_model(e)).eval()(frames, t, generator=torch.Generator().manual_seed(1)) for e in (estimator,)]
    exact = _sharpened(_model("enumerate")).eval()(frames, t, generator=torch.Generator().manual_seed(1))
    for name, value in exact.as_dict().items():
        torch.testing.assert_close(made[0].as_dict()[name], value)


def test_one_solve_for_all_flows() -> None:
    model = _model("enumerate")
    seen = []
    model.flow.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    model(*_batch())
    assert seen == [(18, 12)]


def test_annealing_evaluates_all_flows_and_trains_one() -> None:
    model = _model("balanced")
    seen = []
    model.flow.register_forward_pre_hook(lambda _, arguments: seen.append((len(arguments[0]), torch.is_grad_enabled())))
    model(*_batch())
    assert seen == [(18, False), (6, True)]


def test_flows_that_are_ruled_out_are_not_solved() -> None:
    model = _model("enumerate")
    with torch.no_grad():
        model.factor_encoder.head.weight.zero_()
        model.factor_encoder.head.bias.copy_(torch.tensor([0.0, 30.0, 0.0]))
    seen = []
    model.flow.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2].tolist()))
    terms = model(*_batch())
    terms.loss.backward()
    assert seen == [[1] * 6]
    assert terms.kl_factor.item() == pytest.approx(math.log(3))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.eval()(*_batch())
    assert len(seen[1]) == 18


def test_truncation_keeps_at_least_one() -> None:
    uniform = torch.full((2, 4), -math.log(4))
    torch.testing.assert_close(truncate(uniform, 0.49), uniform)
    torch.testing.assert_close(truncate(torch.tensor([1e-5, 1 - 1e-5]).log(), 1e-4).exp(), torch.tensor([0.0, 1.0]))


def test_divergence_is_taken_per_sample() -> None:
    """Two sure samples that average to the prior are still sure; an average over the batch would find no divergence."""
    model = _model("enumerate")

    class Sure(torch.nn.Module):
        num_flows = 3

        def forward(self, frames):
            return torch.distributions.Categorical(logits=60 * torch.eye(3)[torch.arange(len(frames)) % 3])

    model.factor_encoder = Sure()
    assert model(*_batch()).kl_factor.item() == pytest.approx(math.log(3), abs=1e-4)
    q = torch.tensor([[0.7, 0.2, 0.1], [1 / 3] * 3], requires_grad=True)
    p = torch.tensor([0.5, 0.25, 0.25])
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(q), torch.distributions.Categorical(p.expand(2, 3))
    )
    torch.testing.assert_close(factor_divergence(q.log(), p.log()), wanted)


def test_gumbel_draws_from_q() -> None:
    q = torch.tensor([0.6, 0.3, 0.1])
    weights = GumbelEstimator().draw(q.log().expand(20_000, 3), torch.Generator().manual_seed(0))
    assert set(weights.unique().tolist()) == {0.0, 1.0} and bool((weights.sum(-1) == 1).all())
    torch.testing.assert_close(weights.mean(0), q, atol=0.015, rtol=0)


def test_gumbel_gradients_flow_per_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model({"name": "gumbel", "start": 2.0})
    frames, t = _batch()
    logits = torch.zeros(6, 3, requires_grad=True)
    monkeypatch.setattr(model, "infer_factor", lambda _: torch.distributions.Categorical(logits=logits))
    acting = []
    model.flow.register_forward_pre_hook(lambda _, arguments: acting.append(arguments[2].detach()))
    pieces = []
    original = SequenceTerms.mean
    monkeypatch.setattr(SequenceTerms, "mean", lambda p: pieces.append(p) or original(p))
    model(frames, t, generator=torch.Generator().manual_seed(0))
    assert len(acting[0].argmax(-1).unique()) > 1  # samples of one batch follow different flows
    for i in range(6):
        (gradient,) = torch.autograd.grad(pieces[0].loss[i], logits, retain_graph=True)
        assert gradient[i].abs().max() > 0
        assert not gradient[torch.arange(6) != i].any()


def test_gumbel_loss_is_that_of_the_drawn_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "draw", lambda q, *_, **__: q.mean)
    model = _model("gumbel")
    frames, t = _batch()
    k = torch.tensor([2, 0, 1, 1, 2, 0])
    one_hot = torch.nn.functional.one_hot(k, 3).float()
    monkeypatch.setattr(model.estimator, "draw", lambda *_: one_hot)
    terms = model(frames, t)
    torch.testing.assert_close(terms.reconstruction, model(frames, t, k).reconstruction)


@pytest.mark.parametrize("prior", [None, [0.1, 0.3, 0.6]])
def test_responsibilities_have_the_marginals(prior: list[float] | None) -> None:
    losses = 100 * torch.rand(200, 3) - torch.tensor([80.0, 0.0, 0.0])  # the first flow is better for nearly all
    p = None if prior is None else torch.tensor(prior)
    r = balanced_responsibilities(losses, 50.0, p, iterations=30)
    torch.testing.assert_close(r.sum(-1), torch.ones(200))
    torch.testing.assert_close(r.mean(0), torch.full((3,), 1 / 3) if p is None else p, atol=1e-3, rtol=0)
    free = balanced_responsibilities(losses, 50.0, p, balance=0.0)
    bayes = (-losses / 50 + (0 if p is None else p.log())).softmax(-1)
    torch.testing.assert_close(free, bayes)


def test_a_partial_balance_has_its_price() -> None:
    """The unbalanced problem's optimum: no small change of r lowers cost, entropy and price together."""
    tau, balance = 20.0, 0.7
    losses = (50 * torch.rand(40, 3) - torch.tensor([30.0, 0.0, 0.0])).double()
    price = tau * balance / (1 - balance)
    r = balanced_responsibilities(losses, tau, balance=balance, iterations=200)
    logits = r.log().requires_grad_()

    def objective(logits: torch.Tensor) -> torch.Tensor:
        r = logits.softmax(-1)
        marginal = r.mean(0)
        entropic = (r * (3 * r).log()).sum(-1).mean()
        # Relative to marginals that are free: the entropy's share in the marginals is part of the transport.
        return (r * losses).sum(-1).mean() + tau * entropic + price * (marginal * (3 * marginal).log()).sum()

    (gradient,) = torch.autograd.grad(objective(logits), logits)
    assert float(gradient.abs().max()) < 1e-6


def test_balance_splits_what_greed_would_not() -> None:
    """The better flow is better for every sample; balanced, each flow keeps those whom leaving it costs most."""
    advantage = torch.linspace(1, 10, 10)
    losses = torch.stack([torch.zeros(10), advantage], -1)
    r = balanced_responsibilities(losses, 0.05, iterations=500)
    assert r.argmax(-1).tolist() == [1] * 5 + [0] * 5
    assert balanced_responsibilities(losses, 0.05, balance=0.0).argmax(-1).tolist() == [0] * 10


def test_balanced_trains_flows_and_q_on_the_responsibilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many draws of k the gradients are those of sum_k r_ik loss_ik and of the cross-entropy to r."""
    monkeypatch.setattr(objectives, "draw", lambda q, *_, **__: q.mean)
    model = _sharpened(_model({"name": "balanced", "tau": 0.02, "tau_end": 0.01, "judge_frames": None}))
    frames, t = _batch()
    r = []
    original = model.estimator.responsibilities
    monkeypatch.setattr(model.estimator, "responsibilities", lambda *a: r.append(original(*a)) or r[-1])
    watched = [model.factor_encoder.head.bias, model.decoder.body[0].bias]
    total = [torch.zeros_like(p) for p in watched]
    for _ in range(80):
        model.estimator.step.zero_()
        found = torch.autograd.grad(model(frames, t).loss, watched)
        total = [a + g / 80 for a, g in zip(total, found, strict=True)]
    assert all(torch.equal(r[0], other) for other in r)
    assert float(r[0].std(0).max()) > 0.05  # the samples differ, or the test would say little
    q = model.infer_factor(frames)
    torch.testing.assert_close(total[0], (q.probs - r[0]).mean(0).detach())
    losses = torch.stack([torch.stack([model(frames[i : i + 1], t, k).loss for k in range(3)]) for i in range(6)])
    (wanted,) = torch.autograd.grad((r[0] * losses).sum(-1).mean(), watched[1])
    assert float((total[1] - wanted).norm() / wanted.norm()) < 0.15


def test_flows_are_judged_by_few_frames_and_without_regularizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many draws the judged losses are minus the bound of every sequence under every flow."""
    monkeypatch.setattr(objectives, "draw", lambda q, *_, **__: q.mean)
    model, (frames, t), found = _model({"name": "balanced", "judge_frames": 1}, hj_weight=1e3), _batch(), []
    original = model.estimator.responsibilities
    monkeypatch.setattr(model.estimator, "responsibilities", lambda *a: found.append(a[0]) or original(*a))
    decoded = []
    model.decoder.register_forward_pre_hook(lambda _, arguments: decoded.append(arguments[0].shape[:-1]))
    with torch.no_grad():
        for _ in range(300):
            model.estimator.step.zero_()
            model(frames, t)
        assert decoded[0] == (1, 3, 6)
        wanted = -torch.stack([torch.stack([model(x[None], t, k).bound for k in range(3)]) for x in frames])
        # Less what all flows have in common, the first frame.
        first = model.decoder(model.encode(frames[:, 0]).mean).log_prob(frames[:, 0])
    judged = torch.stack(found) - first.unsqueeze(-1)
    assert bool(((judged.mean(0) - wanted).abs() < 5 * judged.std(0) / 300**0.5 + 1e-3).all())


def test_steps_are_counted_in_training_alone() -> None:
    model = _model({"name": "balanced", "handover": 0.0}, tau=100.0, anneal_steps=2)
    frames, t = _batch()
    model.eval()(frames, t)
    model.train()(frames, t, 0)
    assert int(model.estimator.step) == 0 and model.estimator.temperature == 100.0
    model(frames, t)
    assert model.estimator.temperature == pytest.approx(10.0) and not model.estimator.annealed
    model(frames, t)
    assert model.estimator.temperature == pytest.approx(1.0) and model.estimator.annealed
    terms = model(frames, t, generator=torch.Generator().manual_seed(0))  # annealed: the exact expectation
    bound = terms.loss - terms.hj * model.hj_weight - terms.bending * model.bending_weight - terms.start
    torch.testing.assert_close(bound, -terms.bound)


def test_q_takes_over_once_it_has_learned_the_responsibilities() -> None:
    estimator = BalancedEstimator(anneal_steps=20)
    r = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    for _ in range(30):
        estimator.compare(r, torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log())
    assert float(estimator.agreement) == pytest.approx(1 - 0.9**30)
    overlaps = []
    for q, expected in (([[0.1, 0.9], [0.9, 0.1]], 0.4), ([[0.9, 0.1], [0.7, 0.3]], 0.9)):
        estimator.agreement.zero_()
        estimator.compare(r, torch.tensor(q).log())
        overlaps.append((float(estimator.agreement), 0.1 * expected))
    assert all(found == pytest.approx(wanted) for found, wanted in overlaps)
    for step, agreement, over in [
        (19, 1.0, False),
        (20, 0.8, False),
        (20, 0.95, True),
        (39, 0.0, False),
        (40, 0.0, True),
    ]:
        estimator.step.fill_(step)
        estimator.agreement.fill_(agreement)
        assert estimator.annealed is over


def test_training_compares_q_with_the_responsibilities() -> None:
    model = _model(tau=100.0, anneal_steps=5)
    frames, t = _batch()
    with torch.no_grad():
        model.train()(frames, t)
    assert float(model.estimator.agreement) == 0
    for _ in range(6):
        model(frames, t)
    assert 0 < float(model.estimator.agreement) < 0.9 and not model.estimator.annealed
    loaded = _model(tau=100.0, anneal_steps=5)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded.estimator.agreement, model.estimator.agreement)


def test_the_papers_temperatures() -> None:
    estimator = GumbelEstimator()
    found = []
    for step in (0, 10_000, 90_000, 200_000):
        estimator.step.fill_(step)
        found.append(estimator.temperature)
    assert found == pytest.approx([1.0, math.exp(-0.3), math.exp(-2.7), 0.05])


@pytest.mark.parametrize("estimator", [*ESTIMATORS, {"name": "balanced", "tau": 50.0, "balance": 0.9}])
def test_saved_and_loaded(tmp_path: Path, estimator) -> None:
    model = _model(estimator, factor_prior=[0.1, 0.3, 0.6])
    frames, t = _batch()
    for _ in range(3):
        model(frames, t)
    model.save_pretrained(tmp_path)
    again = ff.models.FlowFactorizedVAE.from_pretrained(tmp_path)
    assert again.config() == model.config() and again.supervision == "weak"
    assert int(again.estimator.step) == 3 and again.estimator.config == model.estimator.config
    torch.testing.assert_close(again.infer_factor(frames).probs, model.infer_factor(frames).probs)
    one, other = (m.eval()(frames, t, generator=torch.Generator().manual_seed(0)) for m in (model, again))
    torch.testing.assert_close(one.bound, other.bound)


def test_a_supervised_model_is_as_before() -> None:
    model = ff.models.build_vae((1, 8, 8), 3, 4, hidden=(8, 8))
    assert model.supervision == "full" and "factor_encoder" not in model.config()["parts"]
    assert not [name for name in model.state_dict() if "factor" in name or "estimator" in name]
    assert float(model(*_batch(), 0).kl_factor) == 0.0
    for use in (lambda: model(*_batch()), lambda: model.infer_factor(_batch()[0])):
        with pytest.raises(ValueError, match="no factor encoder"):
            use()


def test_the_likelihood_where_k_is_inferred() -> None:
    model = _sharpened(_model(factor_prior=[0.2, 0.2, 0.6])).eval()
    frames, t = _batch()
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        one = torch.stack([model.log_likelihood(frames, t, samples=1, generator=g).mean() for _ in range(100)]).mean()
        elbo = torch.stack([model(frames, t, generator=g).bound for _ in range(100)]).mean()
        many = model.log_likelihood(frames, t, samples=256, generator=g).mean()
    assert float(one) == pytest.approx(float(elbo), abs=0.5) and many > one


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"estimator": "best"}, ValueError, "balanced"),
        ({"estimator": {"name": "gumbel", "heat": 1}}, ValueError, "heat"),
        ({"tau": 0.0}, ValueError, "tau"),
        ({"tau": float("nan")}, ValueError, "tau"),
        ({"tau": 0.5}, ValueError, "tau_end"),
        ({"anneal_steps": 0}, ValueError, "anneal_steps"),
        ({"anneal_steps": 1.5}, TypeError, "anneal_steps"),
        ({"estimator": {"name": "balanced", "judge_frames": 0}}, ValueError, "judge_frames"),
        ({"estimator": {"name": "balanced", "judge_frames": True}}, TypeError, "judge_frames"),
        ({"estimator": {"name": "gumbel", "tau": 3.0}}, ValueError, "tau"),
        ({"estimator": {"name": "balanced", "balance": 1.5}}, ValueError, "balance"),
        ({"estimator": {"name": "balanced", "handover": 1.5}}, ValueError, "handover must lie between 0"),
        ({"estimator": {"name": "enumerate", "prune": 0.6}}, ValueError, "prune"),
        ({"factor_prior": [0.5, 0.5]}, ValueError, "3 positive probabilities"),
        ({"factor_prior": [0.5, 0.5, 0.0]}, ValueError, "3 positive probabilities"),
        ({"factor_prior": [0.5, 0.5, 0.5]}, ValueError, "sum to 1"),
        ({"supervision": "some"}, ValueError, "supervision"),
        ({"num_frames": None}, ValueError, "num_frames"),
    ],
)
def test_wrong_settings_are_refused(settings: dict, error: type[Exception], message: str) -> None:
    made = {"supervision": "weak", "num_frames": 4} | settings
    with pytest.raises(error, match=message):
        ff.models.build_vae((1, 8, 8), 3, 4, hidden=(8, 8), **made)


def test_parts_that_do_not_fit_are_refused() -> None:
    model = _model()
    parts = (model.encoder, model.decoder, model.flow)
    with pytest.raises(ValueError, match="2 flows"):
        ff.models.FlowFactorizedVAE(*parts, factor_encoder=ff.encoders.FactorEncoder(2, 4, 1, 8))
    with pytest.raises(ValueError, match="factor_encoder"):
        ff.models.FlowFactorizedVAE(*parts, factor_prior=[0.2, 0.3, 0.5])
    with pytest.raises(TypeError, match="estimator"):
        ff.models.FlowFactorizedVAE(*parts, estimator=3)
    with pytest.raises(ValueError, match="4, 1, 8, 8"):
        model(torch.rand(2, 3, 1, 8, 8), torch.arange(3))
    with pytest.raises(ValueError, match=r"\[B, T\+1, 1, 8, 8\]"):
        model(torch.rand(2, 4, 3, 8, 8), torch.arange(4))
    wrong = [
        ({"tau": 0.0}, "tau must be positive"),
        ({"tau": 1.0, "balance": 2.0}, "balance must lie between"),
        ({"tau": 1.0, "prior": torch.ones(2)}, "one probability a flow"),
    ]
    for settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            balanced_responsibilities(torch.zeros(4, 3), **settings)


def _moving(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares that move right, or down, by a pixel a frame."""
    k = torch.randint(2, (count,), generator=generator)
    start = torch.randint(4, (count, 2), generator=generator)
    frames = torch.zeros(count, 4, 1, 8, 8)
    for i in range(count):
        for t in range(4):
            y, x = (start[i] + t * torch.tensor([[0, 1], [1, 0]])[k[i]]).tolist()
            frames[i, t, 0, y : y + 2, x : x + 2] = 1.0
    return frames, k


def test_balanced_finds_the_transformations(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    model = ff.models.build_vae(
        (1, 8, 8),
        2,
        8,
        hidden=(16, 16),
        supervision="weak",
        num_frames=4,
        tau=20.0,
        anneal_steps=120,
        field="helmholtz",
    )
    frames, k = _moving(512, generator)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3, betas=(0.9, 0.99))
    for _ in range(200):
        chosen = torch.randint(512, (48,), generator=generator)
        optimizer.zero_grad()
        model(frames[chosen], torch.arange(4), generator=generator).loss.backward()
        optimizer.step()
    frames, k = _moving(200, generator)
    found = model.eval().infer_factor(frames).probs.argmax(-1)
    agreement = float((found == k).float().mean())
    assert max(agreement, 1 - agreement) > 0.95
