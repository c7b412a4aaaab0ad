"""The closed-form protocol: what all its classes compute, against autograd, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import flowfactor as ff
from flowfactor.networks.batching import Layout
from flowfactor.networks.displacement_adjoint import DisplacementAdjoint
from flowfactor.networks.outer_tanh_adjoint import OuterTanhAdjoint
from flowfactor.networks.ridge_adjoint import RidgeAdjoint
from flowfactor.networks.stage_adjoint import Outputs, Residuals, StageAdjoint, Stages
from flowfactor.networks.stationary_adjoint import StationaryAdjoint
from flowfactor.networks.sum_adjoint import StackedSumAdjoint, SumAdjoint
from flowfactor.networks.two_layer_adjoint import TwoLayerAdjoint
from flowfactor.networks.velocity_adjoint import VelocityAdjoint
from flowfactor.networks.weighted_adjoint import WeightedAdjoint

D, K, N = 4, 3, 5
TIMES = [0.2, 0.9, 0.4]


def mlp() -> ff.potentials.MLPPotential:
    return ff.potentials.MLPPotential(D, K, (6, 5), rank=2, time_features=4, init_scale=1.5)


def timeless() -> ff.potentials.MLPPotential:
    return ff.potentials.MLPPotential(D, K, (6, 5), rank=2, time_features=0, init_scale=1.5)


def solenoidal() -> ff.fields.SolenoidalField:
    return ff.fields.SolenoidalField(D, K, 7, rank=2, time_features=4, init_scale=1.5)


FIELDS: dict[str, tuple[Callable[[], ff.fields.Field], type[StageAdjoint]]] = {
    "two layers": (lambda: ff.fields.GradientField(mlp()), TwoLayerAdjoint),
    "outer tanh": (lambda: ff.fields.GradientField(ff.potentials.PaperPotential(D, K)), OuterTanhAdjoint),
    "velocity": (lambda: ff.fields.FreeField(D, K, (6, 5), rank=2, time_features=4), VelocityAdjoint),
    "ridge": (solenoidal, RidgeAdjoint),
    "skew": (lambda: ff.fields.SkewGradientField(ff.potentials.PaperPotential(D, K)), SumAdjoint),
    "canonical": (lambda: ff.fields.SkewGradientField(mlp(), "canonical"), SumAdjoint),
    "sum": (lambda: ff.fields.HelmholtzField(mlp(), solenoidal(), mlp()), SumAdjoint),
    "timeless two layers": (lambda: ff.fields.GradientField(timeless()), TwoLayerAdjoint),
    "timeless outer tanh": (
        lambda: ff.fields.GradientField(ff.potentials.PaperPotential(D, K, time_features=0)),
        OuterTanhAdjoint,
    ),
    "timeless velocity": (lambda: ff.fields.FreeField(D, K, (6, 5), rank=2, time_features=0), VelocityAdjoint),
    "timeless ridge": (lambda: ff.fields.SolenoidalField(D, K, 7, rank=2, time_features=0), RidgeAdjoint),
    "timeless displacement": (
        lambda: ff.fields.GradientField(ff.potentials.DisplacementPotential(D, K, rest=2, hidden=6, time_features=0)),
        DisplacementAdjoint,
    ),
    "stationary": (lambda: ff.fields.GradientField(ff.potentials.Stationary(timeless())), StationaryAdjoint),
    "timeless sum": (lambda: ff.fields.HelmholtzField(timeless(), solenoidal(), mlp()), SumAdjoint),
    "timeless stacked sum": (lambda: ff.fields.HelmholtzField(timeless(), timeless()), StackedSumAdjoint),
    "stacked sum": (lambda: ff.fields.HelmholtzField(mlp(), mlp(), mlp()), StackedSumAdjoint),
}
FULL = frozenset({"velocity", "value", "gradient", "time", "divergence"})


def adjoint_of(name: str, divergence: str | None = None, weighted: bool = False) -> StageAdjoint:
    make, kind = FIELDS[name]
    probe = torch.randn(K, N, D).sign().double() if divergence == "hutchinson" else None
    if weighted and probe is not None:
        probe = probe[:1].expand(K, N, D)
    adjoint = (
        make()
        .double()
        .stage_adjoint(
            Layout((K * N,), range(K)),
            frozenset({"value", "time"}),
            divergence,  # type: ignore[arg-type]
            probe,
        )
    )
    assert type(adjoint) is (SumAdjoint if "stacked sum" in name and divergence else kind)
    if not weighted:
        return adjoint
    weights = torch.randn(2, N, K).double().requires_grad_()
    return WeightedAdjoint(adjoint, weights, [0.0, 0.5])


def stages_of(adjoint: StageAdjoint, zs: Sequence[Tensor]) -> tuple[Stages, list[Tensor], list[Residuals]]:
    """Stages that were evaluated in another order than they are stacked in; their velocities; their residuals."""
    terms = adjoint.time_terms(TIMES)
    order = [2, 0, 1]
    found = {i: adjoint.velocity(zs[i], terms[i]) for i in order}
    residuals = [found[i][1] for i in range(len(zs))]
    return adjoint.stack(residuals, TIMES), [found[i][0] for i in range(len(zs))], residuals


@pytest.mark.parametrize("weighted", [False, True], ids=["single", "weighted"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", FIELDS)
def test_every_output_and_its_pullback_are_those_of_autograd(name: str, divergence: str, weighted: bool) -> None:
    check(adjoint_of(name, divergence, weighted), FULL)


@pytest.mark.parametrize("weighted", [False, True], ids=["single", "weighted"])
@pytest.mark.parametrize("name", ["stacked sum", "timeless stacked sum"])
def test_a_sum_in_one_stack_is_that_of_autograd(name: str, weighted: bool) -> None:
    check(adjoint_of(name, weighted=weighted), FULL - {"divergence"})


def check(adjoint: StageAdjoint, want: frozenset[str]) -> None:
    groups = 1 if isinstance(adjoint, WeightedAdjoint) else K
    zs = [torch.randn(groups, N, D).double().requires_grad_() for _ in TIMES]
    inputs = [x.detach().requires_grad_() for x in adjoint.inputs]  # which may depend on one another
    bound = adjoint.by_autograd(inputs)
    expected = [bound(z, z.new_tensor(t)) for z, t in zip(zs, TIMES, strict=True)]
    with torch.no_grad():
        stages, velocities, residuals = stages_of(adjoint, [z.detach() for z in zs])
        outputs = stages.outputs(want)
        divergences = adjoint.divergence(residuals) if "divergence" in want else torch.empty(0)
    for i, found in enumerate(expected):
        torch.testing.assert_close(velocities[i], found["velocity"])
        if "divergence" in want:
            torch.testing.assert_close(divergences[i], found["divergence"])
        for key, value in outputs.items():
            torch.testing.assert_close(value[:, i], found[key])
    assert outputs.keys() >= {"velocity"} | (want & {"divergence"})
    assert stages.outputs(frozenset({"velocity"})).keys() == {"velocity"}
    compare_pullback(stages, outputs, expected, zs, inputs)


def compare_pullback(
    stages: Stages, outputs: Outputs, expected: list[Outputs], zs: list[Tensor], inputs: list[Tensor]
) -> None:
    cotangents = {key: torch.randn_like(value) for key, value in outputs.items()}
    lam = [torch.randn_like(z) for z in zs]
    values = [found[key] for found in expected for key in outputs] + [found["velocity"] for found in expected]
    bars = [cotangents[key][:, i] for i in range(len(zs)) for key in outputs] + lam
    pairs = [(v, b) for v, b in zip(values, bars, strict=True) if v.requires_grad]
    wanted = torch.autograd.grad([v for v, _ in pairs], [*zs, *inputs], [b for _, b in pairs], allow_unused=True)
    for parameters in (True, False):
        pullback = stages.pullback(cotangents, parameters=parameters)
        for i in (1, 2, 0):
            back = pullback.pull(i, lam[i].detach())
            if pullback.direct is not None:
                back = back + pullback.direct[:, i]
            torch.testing.assert_close(back, wanted[i])
        if not parameters:
            with pytest.raises(RuntimeError, match="parameters=False"):
                pullback.gradients()
            continue
        for found, right, x in zip(pullback.gradients(), wanted[len(zs) :], inputs, strict=True):
            zero = torch.zeros_like(x)
            torch.testing.assert_close(zero if found is None else found, zero if right is None else right)
    whole = stages.pullback(cotangents)
    back = whole.pull(slice(None), torch.stack([x.detach() for x in lam], 1))
    back = back if whole.direct is None else back + whole.direct
    for i in range(len(zs)):
        torch.testing.assert_close(back[:, i], wanted[i])


@pytest.mark.parametrize("name", FIELDS)
def test_a_pullback_refuses_to_be_used_out_of_order(name: str) -> None:
    adjoint = adjoint_of(name)
    zs = [torch.randn(K, N, D).double() for _ in TIMES]
    stages, _, _ = stages_of(adjoint, zs)
    pullback = stages.pullback({})
    with pytest.raises(RuntimeError, match="stage 0 has to be pulled"):
        pullback.gradients()
    pullback.pull(0, zs[0])
    pullback.pull(2, zs[2])
    with pytest.raises(RuntimeError, match="stage 1 has to be pulled"):
        pullback.gradients()
    with pytest.raises(RuntimeError, match="stage 2 was pulled before"):
        pullback.pull(slice(1, 3), torch.stack(zs[1:], 1))
    stages.pullback({}).pull(2, zs[2])  # stages can be pulled back as often as wanted, each time from the start


@pytest.mark.parametrize("name", ["two layers", "outer tanh", "velocity", "sum"])
def test_a_divergence_that_was_not_bound_is_refused(name: str) -> None:
    adjoint = adjoint_of(name)
    stages, _, residuals = stages_of(adjoint, [torch.randn(K, N, D).double() for _ in TIMES])
    with pytest.raises(RuntimeError, match="bound without"):
        adjoint.divergence(residuals)
    with pytest.raises(RuntimeError, match="bound without"):
        stages.outputs(frozenset({"divergence"}))


@pytest.mark.parametrize("name", FIELDS)
def test_an_adjoint_keeps_nothing_of_what_it_evaluated(name: str) -> None:
    adjoint = adjoint_of(name)
    before = set(vars(adjoint))
    zs = [torch.randn(K, N, D).double() for _ in TIMES]
    stages, _, _ = stages_of(adjoint, zs)
    first = stages.outputs(frozenset({"velocity"}))["velocity"]
    stages_of(adjoint, [torch.randn_like(z) for z in zs])
    assert set(vars(adjoint)) == before
    assert torch.equal(stages.outputs(frozenset({"velocity"}))["velocity"], first)
