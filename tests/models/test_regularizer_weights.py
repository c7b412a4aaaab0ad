"""Weights of the divergence-free part and of the acceleration, and a solver of the evaluation's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfactor as ff
from flowfactor import objectives

SHAPE, K, D = (1, 8, 8), 2, 4
FRAMES, KS = torch.rand(4, 4, *SHAPE), torch.tensor([0, 1, 1, 0])
TIMES = torch.tensor([0.0, 1.0, 2.0, 4.0])
EULER = {"method": "euler", "step_size": 1.0}
FINE = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6}


def build(kind: str = "vae", **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"hidden": (8, 8), "solver": EULER, "field": "helmholtz", **settings}
    if kind == "vae":
        return ff.models.build_vae(SHAPE, K, D, **settings)
    return ff.models.build_sparse_vae(SHAPE, K, D, **{"warmup_steps": 0, **settings})


def terms_of(model: Any, **also: Any) -> Any:
    return model(FRAMES, TIMES, KS, generator=torch.Generator().manual_seed(0), **also)


def along_euler_steps(model: Any, rate: Any) -> Tensor:
    """The mean of a rate over unit Euler steps from the draws that `terms_of` begins with."""
    z = objectives.draw(model.encode(FRAMES[:, 0]), generator=torch.Generator().manual_seed(0))
    rates = []
    for t in range(4):
        rates.append(rate(z, float(t)))
        z = z + model.flow.velocity(z, float(t), KS)
    return torch.stack(rates).mean()


def test_terms_are_means_over_time_along_the_path() -> None:
    model = build(solenoidal_weight=3.0, acceleration_weight=0.5)
    field = model.flow.field

    def rest(z: Tensor, t: float) -> Tensor:
        return (field(z, t, KS) - field.potential.derivatives(z, t, KS).gradient).square().sum(-1)

    def bend(z: Tensor, t: float) -> Tensor:
        """Dv/Dt by a central difference along the path."""
        z, h = z.double(), 1e-4
        with torch.no_grad():
            v = field.double()(z, t, KS)
            ahead, behind = (field(z + sign * h * v, t + sign * h, KS) for sign in (1, -1))
        field.float()
        return ((ahead - behind) / (2 * h)).square().sum(-1).float()

    terms = terms_of(model)
    torch.testing.assert_close(terms.solenoidal, along_euler_steps(model, rest))
    torch.testing.assert_close(terms.acceleration, along_euler_steps(model, bend), rtol=1e-3, atol=1e-7)
    assert terms.solenoidal > 0
    assert terms.acceleration > 0


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    ("kind", "more"), [("vae", {}), ("sparse", {}), ("sparse", {"warmup_steps": 5}), ("sparse", {"control": "double"})]
)
def test_the_loss_is_what_the_weights_say(kind: str, more: dict[str, Any], relative: bool) -> None:
    weights = {"hj_weight": 2.0, "start_weight": 0.25, "solenoidal_weight": 3.0, "acceleration_weight": 0.5}
    weights |= {"commutator_weight": 4.0, "error_weight": 50.0}
    terms, bare = (
        terms_of(build(kind, relative_weights=relative, **more, **given).train())
        for given in (weights, dict.fromkeys(weights, 0.0))
    )
    added = 2 * terms.hj + 0.25 * terms.start + 3 * terms.solenoidal + 0.5 * terms.acceleration + 4 * terms.commutator
    added = added + 50 * terms.solver_error
    torch.testing.assert_close(terms.loss - bare.loss, (64 if relative else 1) * added, rtol=1e-4, atol=1e-4)
    found = terms.as_dict()
    assert all(
        float(found[name]) > 0 for name in ("hj", "start", "solenoidal", "acceleration", "commutator", "solver_error")
    )
    assert float(bare.solenoidal) == float(bare.acceleration) == float(bare.commutator) == float(bare.solver_error) == 0


@pytest.mark.parametrize("more", [{}, {"field": "free"}, {"field": "gradient"}, {"context": 2}])
def test_commutators_are_means_over_pairs_and_frames(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = ff.models.build_vae(SHAPE, 3, D, hidden=(8, 8), solver=EULER, commutator_weight=2.0, **more)
    c = {"context": torch.randn(4, 2)} if "context" in more else {}
    z = objectives.draw(model.encode(FRAMES[:, 0]), generator=torch.Generator().manual_seed(0))
    path = model.flow(z, TIMES, KS, **c)
    alone = [
        ff.regularizers.Commutator([pair])(model.flow, path.z[i], TIMES[i], **c).mean()
        for pair in ((0, 1), (0, 2), (1, 2))
        for i in range(4)
    ]
    each = torch.stack(alone).detach()
    torch.testing.assert_close(terms_of(model.eval(), **c).commutator, each.mean())
    monkeypatch.setattr(objectives, "draw", lambda *_, **__: z)
    model.train()
    drawn = [
        model(FRAMES, TIMES, KS, generator=torch.Generator().manual_seed(seed), **c).commutator.detach()
        for seed in range(40)
    ]
    near = (torch.stack(drawn)[:, None] / each - 1).abs().min(1)
    assert float(near.values.max()) < 1e-4
    assert len(near.indices.unique()) > 6  # of 12


def test_terms_of_inferred_flows_are_expectations(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []
    mean = ff.models.SequenceTerms.mean
    monkeypatch.setattr(ff.models.SequenceTerms, "mean", lambda one: pieces.append(one) or mean(one))
    model = build(
        supervision="weak", num_frames=4, solenoidal_weight=1.0, acceleration_weight=1.0, commutator_weight=1.0
    ).eval()
    for k in (None, 0, 1):
        model(FRAMES, TIMES, k, generator=torch.Generator().manual_seed(0))
    weak, *each = pieces
    q = model.infer_factor(FRAMES).probs
    for name in ("solenoidal", "acceleration", "commutator"):
        table = torch.stack([getattr(one, name) for one in each], -1)
        torch.testing.assert_close(getattr(weak, name), (q * table).sum(-1))


def test_an_estimator_may_leave_them_out() -> None:
    parts = [torch.rand(3, 2, dtype=torch.float64) for _ in range(6)]
    terms = ff.models.SequenceTerms(*parts)
    for name in ("solenoidal", "acceleration", "code", "commutator", "solver_error"):
        assert getattr(terms, name).shape == (3, 2) and getattr(terms, name).dtype == torch.float64
        assert not getattr(terms.expected(parts[0].log()), name).any()
        assert float(getattr(terms.mean(), name)) == 0


@pytest.mark.parametrize("kind", ["vae", "sparse"])
def test_one_flow_alone_has_nothing_to_commute_with(kind: str) -> None:
    made = {"vae": ff.models.build_vae, "sparse": ff.models.build_sparse_vae}[kind]
    with pytest.raises(ValueError, match=r"commutator_weight=2 asks pairs .* one flow alone: leave it at 0"):
        made(SHAPE, 1, D, hidden=(8, 8), commutator_weight=2.0)


@pytest.mark.parametrize("kind", ["vae", "sparse"])
@pytest.mark.parametrize("name", ["solenoidal", "acceleration"])
def test_lazy_steps_take_them_too(kind: str, name: str) -> None:
    alone = {"hj_weight": 0.0, "start_weight": 0.0, f"{name}_weight": 1.0}
    lazy, always = (build(kind, regularize_every=every, **alone).train() for every in (3, 1))
    taken = 0
    with torch.no_grad():
        for seed in range(30):
            ours, plain = (
                getattr(model(FRAMES, TIMES, KS, generator=torch.Generator().manual_seed(seed)), name)
                for model in (lazy, always)
            )
            taken += bool(ours)
            if ours:
                torch.testing.assert_close(ours, 3 * plain)
    assert 2 < taken < 20
    assert bool(getattr(terms_of(lazy.eval()), name) > 0)


def test_times_of_each_sequence_and_missing_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sequence has the terms that it has alone; one of a single observed frame has none."""
    monkeypatch.setattr(objectives, "draw", lambda q, *_, **__: q.mean)
    model = build(solver={"method": "rk4"}, solenoidal_weight=1.0, acceleration_weight=1.0, hj_weight=0.0)
    model.commutator_weight = 1.0
    model.eval()
    t = torch.tensor([[0.0, 1.0, 2.0, 4.0], [0.0, 0.5, 0.7, 3.0], [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0]])
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2, 2:], mask[3, 1:] = False, False
    together = model(FRAMES, t, KS, mask=mask)
    rows = range(len(FRAMES))
    alone = [model(FRAMES[i : i + 1], t[i], KS[i : i + 1], mask=mask[i : i + 1]) for i in rows]
    for name in ("solenoidal", "acceleration"):
        each = torch.stack([getattr(terms, name) for terms in alone])
        torch.testing.assert_close(getattr(together, name), each.mean(), rtol=1e-3, atol=1e-7)
        assert bool((each[:3] > 0).all()) and not bool(each[3])
    each = torch.stack([terms.commutator for terms in alone])
    torch.testing.assert_close(together.commutator, each.mean(), rtol=1e-3, atol=1e-9)
    assert bool((each > 0).all())  # one that rests is somewhere, too


@pytest.mark.parametrize("control", ["single", "double"])
def test_inferred_weights_at_times_of_each_sequence(control: str) -> None:
    model = build("sparse", solver={"method": "rk4"}, control=control, solenoidal_weight=1.0, acceleration_weight=1.0)
    common, own = (
        model(FRAMES, t, generator=torch.Generator().manual_seed(0)) for t in (TIMES, TIMES.expand(4, 4) + 0)
    )
    shifted = TIMES.expand(4, 4) * torch.tensor(
        [[1.0], [1.0], [1.0], [1.0 + 1e-6]]
    )  # each has its own, nearly the same
    nearly = model(FRAMES, shifted, generator=torch.Generator().manual_seed(0))
    for name in ("solenoidal", "acceleration"):
        torch.testing.assert_close(getattr(own, name), getattr(common, name))
        torch.testing.assert_close(getattr(nearly, name), getattr(common, name), rtol=1e-3, atol=1e-7)


def test_the_weight_has_flows_commute() -> None:
    model = build(commutator_weight=1.0, hj_weight=0.0, start_weight=0.0).train()
    step = torch.optim.Adam(model.flow.parameters(), lr=0.01)
    before = terms_of(model.eval()).commutator
    for _ in range(20):
        step.zero_grad()
        terms_of(model.train()).commutator.backward()
        step.step()
    assert terms_of(model.eval()).commutator < 0.5 * before


def test_the_weight_has_the_potential_carry() -> None:
    model = build(solenoidal_weight=1.0, hj_weight=0.0, start_weight=0.0)
    step = torch.optim.SGD(model.flow.parameters(), lr=0.05)
    before = terms_of(model)
    for _ in range(20):
        step.zero_grad()
        terms_of(model).solenoidal.backward()
        step.step()
    assert terms_of(model).solenoidal < 0.7 * before.solenoidal


@pytest.mark.parametrize("kind", ["vae", "sparse"])
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"field": "gradient", "solenoidal_weight": 2.0}, "solenoidal_weight=2 .* GradientField has nothing beside it"),
        (
            {"field": "free", "solenoidal_weight": 1.0},
            "solenoidal_weight=1 .* FreeField has no potential: leave it at 0",
        ),
        ({"solenoidal_weight": -1.0}, r"solenoidal_weight must be a finite number that is not negative, got -1\.0"),
        ({"commutator_weight": -1.0}, r"commutator_weight must be a finite number that is not negative, got -1\.0"),
        ({"acceleration_weight": float("nan")}, "acceleration_weight must be a finite number"),
        ({"acceleration_weight": 1.0, "solver": {**EULER, "compile": True}}, "acceleration_weight=1 .*compile=True"),
        ({"acceleration_weight": 1.0, "evaluation_solver": {"compile": True}}, "acceleration_weight=1 .*compile=True"),
    ],
)
def test_weights_of_what_is_not_there_are_refused(kind: str, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(kind, **settings)


@pytest.mark.parametrize("field", ["gradient", "free"])
def test_every_field_can_be_straightened(field: str) -> None:
    assert bool(terms_of(build(field=field, acceleration_weight=1.0)).acceleration > 0)


@pytest.mark.parametrize("kind", ["vae", "sparse"])
def test_weights_and_solvers_are_saved_and_old_files_load(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    weights = {"solenoidal_weight": 2.0, "acceleration_weight": 0.5, "commutator_weight": 4.0, "error_weight": 8.0}
    model = build(kind, **weights, evaluation_solver=FINE)
    model.save_pretrained(tmp_path)
    loaded = ff.models.load_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in weights} == weights
    assert (loaded.flow.solver, loaded.flow.evaluation_solver) == (ff.Solver(**EULER), ff.Solver(**FINE))
    x0 = torch.rand(2, *SHAPE)
    torch.testing.assert_close(loaded.transform(x0, [0.0, 2.0], 1), model.eval().transform(x0, [0.0, 2.0], 1))
    config = json.loads((tmp_path / "config.json").read_text())
    for name in weights:  # as releases before them wrote it
        del config["settings"][name]
    del config["parts"]["flow"]["evaluation_solver"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = ff.models.load_pretrained(tmp_path)
    assert not any(getattr(old, name) for name in weights)
    assert old.flow.evaluation_solver is None
    assert old.flow.acting_solver == ff.Solver(**EULER)
    assert "evaluation_solver" not in old.config()["parts"]["flow"]


@pytest.mark.parametrize("more", [{}, {"kind": "sparse"}, {"kind": "sparse", "control": "double"}])
def test_a_model_evaluates_by_its_other_solver(more: dict[str, Any]) -> None:
    model = build(evaluation_solver=FINE, **more)
    euler, fine = build(**more), build(solver=FINE, **more)
    for other in (euler, fine):
        other.load_state_dict(model.state_dict())
    weights = torch.full((4, K * getattr(model, "controls", 1)), 0.7)
    for control in (1, weights):
        for one in (model.train(), model.eval()):
            frames = one.transform(FRAMES[:, 0], TIMES, control)
            same, differs = (m.train(one.training).transform(FRAMES[:, 0], TIMES, control) for m in (euler, fine))
            if not one.training:
                same, differs = differs, same
            torch.testing.assert_close(frames, same, rtol=0, atol=0)
            assert not torch.allclose(frames, differs, rtol=0, atol=1e-9)
    torch.testing.assert_close(terms_of(model.eval()).loss, terms_of(fine.eval()).loss, rtol=0, atol=0)
    terms_of(model).loss.backward()
    terms_of(fine).loss.backward()
    for a, b in zip(model.flow.parameters(), fine.flow.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_view_with_two_weights_a_flow_remembers_steps_too() -> None:
    model = build("sparse", control="double", solver={"method": "bosh3", "rtol": 1e-1, "remember_steps": True}).train()
    terms_of(model)
    assert bool(model.flow.step_memory.sizes[0] > 0)
