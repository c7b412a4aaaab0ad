"""The error estimate of a step along the paths of models, by ``error_weight``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flowfactor as ff
from flowfactor import objectives
from flowfactor.models.step_error import step_error

SHAPE, K, D = (1, 8, 8), 2, 4
FRAMES, KS = torch.rand(4, 4, *SHAPE), torch.tensor([0, 1, 1, 0])
TIMES = torch.tensor([0.0, 1.0, 1.5, 4.0])
GAPS = torch.tensor([1.0, 0.5, 2.5])
RK4 = {"method": "rk4", "step_size": 1.0}
ESTIMATE = ff.regularizers.SolverError()


def build(kind: str = "vae", **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"hidden": (8, 8), "solver": RK4, "field": "helmholtz", "error_weight": 3.0, **settings}
    model = (
        ff.models.build_vae(SHAPE, K, D, **settings)
        if kind == "vae"
        else ff.models.build_sparse_vae(SHAPE, K, D, **{"warmup_steps": 0, **settings})
    )
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.mul_(3)  # bent paths
    return model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def terms_of(model: Any, t: Tensor = TIMES, k: Any = KS, **also: Any) -> Any:
    return model(FRAMES, t, k, generator=seeded(), **also)


@pytest.fixture
def _means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Posteriors are drawn at their means."""
    monkeypatch.setattr(objectives, "draw", lambda q, *_, **__: q.mean)


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("more", [{}, {"field": "free"}, {"field": "gradient", "augment_dim": 3}, {"context": 2}])
def test_the_term_is_the_mean_over_the_time_of_steps_towards_the_next_frame(more: dict[str, Any], back: bool) -> None:
    model, t = build(**more).eval(), TIMES.flip(0) if back else TIMES
    c = {"context": torch.randn(4, 2)} if "context" in more else {}
    path = model.flow(model.encode(FRAMES[:, 0]).mean, t, KS, **c)
    step = -1.0 if back else 1.0
    each = torch.stack([ESTIMATE(model.flow, path.z[i], t[i], KS, step=step, **c) for i in range(3)])
    gaps = GAPS.flip(0) if back else GAPS
    known = (gaps.unsqueeze(-1) * each).sum(0) / 4
    assert float(each.detach().min()) > 1e-9
    torch.testing.assert_close(terms_of(model, t, **c).solver_error, known.mean(), rtol=1e-4, atol=0)


def test_drawn_steps_have_the_mean_as_their_expectation() -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(D, K, (8, 8), init_scale=5.0))
    z0, each = torch.randn(2, D), []
    z = flow(z0, TIMES, 1).z.detach()
    for i in range(3):
        each.append(ESTIMATE(flow, z[i], TIMES[i], 1).detach())
    n = 3000
    drawn = step_error(
        ESTIMATE, flow, z.repeat_interleave(n, 1), TIMES, 1, draw=True, generator=seeded()
    ).detach().view(2, n)  # fmt: skip
    for m in range(2):
        near = (drawn[m, :, None] / torch.stack(each)[:, m] - 1).abs().min(1)
        assert float(near.values.max()) < 1e-3  # each is that of a frame,
        share = near.indices.bincount(minlength=3) / n
        torch.testing.assert_close(share, GAPS / 4, rtol=0, atol=0.03)  # drawn by the time to the next
    known = (torch.stack(each) * GAPS.unsqueeze(-1)).sum(0) / 4
    torch.testing.assert_close(step_error(ESTIMATE, flow, z, TIMES, 1).detach(), known)


@pytest.mark.parametrize("kind", ["vae", "sparse"])
def test_a_training_step_takes_one_step_a_sequence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = build(kind), []
    forward = ff.regularizers.SolverError.forward
    monkeypatch.setattr(
        ff.regularizers.SolverError,
        "forward",
        lambda *args, **named: taken.append(args[2].shape) or forward(*args, **named),
    )
    terms = terms_of(model.train())
    terms_of(model.eval())
    assert taken == [(4, D), (3, 4, D)]
    grads = torch.autograd.grad(
        terms.solver_error, [*model.flow.parameters(), *model.encoder.parameters()], allow_unused=True
    )
    assert sum(g is not None and bool(g.any()) for g in grads) > len(grads) / 2  # field and codes learn by it
    model.error_weight = 0.0
    assert float(terms_of(model.train()).solver_error) == 0 and len(taken) == 2


@pytest.mark.parametrize("kind", ["vae", "sparse"])
def test_lazy_steps_leave_it_out_and_make_up_for_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy, other, always = (build(kind, regularize_every=every).train() for every in (3, 3, 1))
    monkeypatch.setattr(lazy, "_lazy", lambda *_: 0)
    monkeypatch.setattr(ff.regularizers.SolverError, "forward", lambda *_, **__: pytest.fail("a step was taken"))
    assert float(terms_of(lazy).solver_error) == 0
    monkeypatch.undo()
    monkeypatch.setattr(other, "_lazy", lambda *_: 3)
    torch.testing.assert_close(terms_of(other).solver_error, 3 * terms_of(always).solver_error)


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("kind", ["vae", "weak"])
def test_times_of_each_sequence_and_missing_frames(kind: str) -> None:
    """Each sequence has the term that it has alone; one that takes no time has none."""
    also = {"supervision": "weak", "num_frames": 4} if kind == "weak" else {}
    model = build(**also).eval()
    t = torch.tensor([[0.0, 1.0, 2.0, 4.0], [4.0, 3.5, 0.7, 0.0], [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0]])
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2, 2:], mask[3, 1:] = False, False
    k = None if kind == "weak" else KS
    rows = [slice(i, i + 1) for i in range(4)]
    each = torch.stack([
        model(FRAMES[i], t[i], None if k is None else k[i], mask=mask[i]).solver_error for i in rows
    ]).detach()  # fmt: skip
    torch.testing.assert_close(model(FRAMES, t, k, mask=mask).solver_error.detach(), each.mean(), rtol=1e-3, atol=1e-9)
    assert bool((each[:3] > 0).all()) and not bool(each[3])
    path = model.flow(model.encode(FRAMES[2:3, 0]).mean, torch.tensor([1.0, 2.0]), 1)
    if kind == "vae":  # of two observed frames: the one step between them
        torch.testing.assert_close(each[2], ESTIMATE(model.flow, path.z[0], 1.0, 1)[0].detach(), rtol=1e-3, atol=1e-9)
    for _ in range(5):  # and in training, what it draws
        assert model.train()(FRAMES[3:], t[3:], None if k is None else k[3:], mask=mask[3:]).solver_error == 0


def test_terms_of_inferred_flows_are_expectations(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, mean = [], ff.models.SequenceTerms.mean
    monkeypatch.setattr(ff.models.SequenceTerms, "mean", lambda one: pieces.append(one) or mean(one))
    model = build(supervision="weak", num_frames=4).eval()
    for k in (None, 0, 1):
        terms_of(model, k=k)
    weak, *each = pieces
    table = torch.stack([one.solver_error for one in each], -1)
    torch.testing.assert_close(weak.solver_error, (model.infer_factor(FRAMES).probs * table).sum(-1))


@pytest.mark.usefixtures("_means")
@pytest.mark.parametrize("control", ["single", "double"])
@pytest.mark.parametrize("own", [False, True])
def test_weights_are_those_of_the_interval(control: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inferred weights switch at frames: a step is taken under those of the way ahead."""
    model = build("sparse", control=control).eval()
    q, weights = type(model.infer_weights(FRAMES)), torch.randn(4, 3, K, model.controls)
    drawn = q.rsample
    monkeypatch.setattr(q, "rsample", lambda *args, **named: drawn(*args, **named)._replace(weights=weights))
    t = TIMES.expand(4, 4) + 0.1 * torch.arange(4.0).unsqueeze(-1) if own else TIMES
    found = terms_of(model, t).solver_error
    z, each = model.encode(FRAMES[:, 0]).mean, []
    for i in range(3):
        acting = weights[:, i].mT.flatten(-2)
        flow, when = model._flow_for(acting), t[:, i] if own else t[i]
        each.append(ESTIMATE(flow, z, when, acting))
        z = flow(z, t[:, i : i + 2].mT if own else t[i : i + 2], acting).z[-1]
    known = (torch.stack(each) * GAPS.unsqueeze(-1)).sum(0) / 4
    torch.testing.assert_close(found, known.mean(), rtol=1e-3, atol=1e-9)


def test_a_drawn_step_is_taken_under_the_weights_of_its_interval() -> None:
    flow = ff.LatentFlow(ff.potentials.MLPPotential(D, K, (8, 8), init_scale=5.0))
    z, weights = torch.randn(4, 50, D), torch.randn(50, 3, K)
    each = torch.stack([ESTIMATE(flow, z[i], TIMES[i], weights[:, i]) for i in range(3)]).detach()
    drawn = step_error(ESTIMATE, flow, z, TIMES, 0, weights=weights, draw=True, generator=seeded()).detach()
    near = (drawn / each - 1).abs().min(0)
    assert float(near.values.max()) < 1e-3 and len(near.indices.unique()) == 3


def test_schedules_act_piece_by_piece() -> None:
    model = build(solver={"method": "dopri5"}).eval()
    schedule = ff.Schedule([(0.0, KS), (1.0, torch.randn(4, K)), (2.0, 0)])
    known = step_error(ESTIMATE, model.flow, model.flow(torch.randn(4, D), TIMES, schedule).z, TIMES, schedule)
    assert known.shape == (4,) and bool((known > 0).all())
    terms_of(model.train(), k=schedule).loss.backward()


@pytest.mark.parametrize(("kind", "bent"), [("vae", 0.7), ("sparse", 0.5)])
def test_a_training_with_it_needs_fewer_evaluations(kind: str, bent: float) -> None:
    solver = {"method": "bosh3", "rtol": 1e-3, "atol": 1e-3}
    model = build(kind, field="gradient", hj_weight=0.0, start_weight=0.0, solver=solver)
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.mul_(bent)  # where a step of one frame says what shorter ones would
    z0 = model.encode(FRAMES[:, 0]).mean.detach()

    def cost() -> int:
        with torch.no_grad():
            return sum(model.flow(z0, TIMES, k).stats.nfe for k in range(K))

    optimizer = torch.optim.Adam(model.flow.parameters(), 0.01)
    before, first = cost(), terms_of(model.eval()).solver_error.detach()
    for seed in range(20):
        optimizer.zero_grad()
        model.train()(FRAMES, TIMES, KS, generator=seeded(seed)).solver_error.backward()
        optimizer.step()
    assert terms_of(model.eval()).solver_error < 0.2 * first
    assert cost() < 0.75 * before


@pytest.mark.parametrize("kind", ["vae", "sparse"])
@pytest.mark.parametrize("weight", [-1.0, float("nan"), "much"])
def test_weights_that_are_none_are_refused(kind: str, weight: Any) -> None:
    with pytest.raises(ValueError, match="error_weight must be a finite number that is not negative"):
        build(kind, error_weight=weight)


def test_it_stands_beside_the_default_equation() -> None:
    assert build(field="gradient").hj_weight == ff.models.build_vae(SHAPE, K, D).hj_weight > 0
