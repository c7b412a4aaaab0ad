"""Fields without time: one-parameter groups, in closed form and cheaper, in every mode and under every control."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import product
from torch import Tensor, nn

import flowfactor as ff
from flowfactor._config import describe, rebuild

D, K, B, C = 4, 3, 6, 2
P, F = ff.potentials, ff.fields
F64 = torch.float64


def mlp(n: int, context: int = 0) -> P.MLPPotential:
    return P.MLPPotential(D, K, (6, 5), rank=2, init_scale=1.5, time_features=n, context=context)


def ridges(n: int, context: int = 0) -> F.SolenoidalField:
    return F.SolenoidalField(D, K, 7, rank=2, init_scale=1.5, time_features=n, context=context)


PARTS: dict[str, Callable[[int, int], Any]] = {
    "mlp": mlp,
    "convex": lambda n, c: P.ConvexPotential(D, K, (6, 5), rank=2, init_scale=1.0, time_features=n, context=c),
    "paper": lambda n, c: P.PaperPotential(D, K, time_features=n, context=c),
    "resnet": lambda n, c: P.ResNetPotential(D, K, width=6, depth=2, init_scale=1.0, time_features=n // 4, context=c),
    "displacement": lambda n, c: P.DisplacementPotential(
        D, K, rest=2, hidden=6, scale=0.5, time_features=n // 4, context=c
    ),
    "free": lambda n, c: F.FreeField(D, K, (6, 5), rank=2, init_scale=1.5, time_features=n, context=c),
    "solenoidal": ridges,
    "skew": lambda n, c: F.SkewGradientField(mlp(n, c)),
    "ridges": lambda n, c: F.HelmholtzField(mlp(n, c), ridges(n, c)),
    "stacked": lambda n, c: F.HelmholtzField(mlp(n, c), mlp(n, c)),
}
CLOSED = [name for name in PARTS if name not in ("convex", "resnet")]


def part(name: str, n: int = 0, context: int = 0) -> Any:
    """A part with so many time features, whose weights are the same with and without."""
    torch.manual_seed(4)
    made = PARTS[name](n, context).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


def states() -> Tensor:
    return torch.randn(B, D, dtype=F64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", PARTS)
def test_a_flow_without_time_does_not_see_when_it_starts(name: str) -> None:
    solver, control = ff.Solver("dopri5", rtol=1e-6, atol=1e-6), torch.arange(B) % K
    for n, same in ((0, True), (4, False)):
        flow = ff.LatentFlow(part(name, n), solver)
        early, late = (flow(states(), [t, t + 2.0], control, log_det=True) for t in (0.0, 5.0))
        found = [
            torch.allclose(a, b, rtol=1e-8, atol=1e-8) for a, b in ((early.z, late.z), (early.log_det, late.log_det))
        ]
        assert found[0] is same
        assert found[1] is same or name in ("solenoidal", "skew")  # whose log-determinant is 0 at any time


@pytest.mark.parametrize("name", CLOSED)
def test_flows_for_s_and_for_t_are_one_for_both_together(name: str) -> None:
    flow = ff.LatentFlow(part(name), ff.Solver("dopri5", rtol=1e-10, atol=1e-10))
    half, rest = flow(states(), [0.0, 0.7], 1).z[-1], [0.0, 1.1]
    torch.testing.assert_close(flow(half, rest, 1).z[-1], flow(states(), [0.0, 1.8], 1).z[-1], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", PARTS)
def test_nothing_of_time_is_left(name: str) -> None:
    timeless, timed = part(name), part(name, 4)
    names = {parameter for parameter, _ in timed.named_parameters()} - {n for n, _ in timeless.named_parameters()}
    if name not in ("resnet", "displacement"):  # the first has a column less, the second no weights of time
        assert {n.split(".")[-1] for n in names} <= {"v", "v1", "v2", "p", "p_bias", "q", "q_bias"}
        assert names
    assert all(parameter.numel() for parameter in timeless.parameters())
    if isinstance(timeless, P.Potential):
        t = torch.randn(B, dtype=F64)
        assert not timeless.derivatives(states(), t, torch.arange(B) % K).time.any()
        assert timed.derivatives(states(), t, torch.arange(B) % K).time.any()


@product(
    gradient=["direct", "checkpoint", "adjoint"],
    name=CLOSED,
    control=["index", "weights"],
    divergence=["exact", "hutchinson"],
    times=["common", "own"],
    context=[0, C],
)
def test_closed_forms_are_those_of_the_general_engine(
    name: str, gradient: Any, control: str, divergence: Any, times: str, context: int
) -> None:
    solver = ff.Solver("rk4", step_size=0.4, gradient=gradient)
    if times == "own" or gradient == "adjoint":  # whose general engine takes steps of its own
        solver = ff.Solver("dopri5", rtol=1e-9, atol=1e-9, gradient=gradient)
    made = part(name, context=context)
    flow = ff.LatentFlow(made, solver, divergence)
    t = torch.tensor([0.0, 0.5, 1.2], dtype=F64)
    t = t.unsqueeze(-1) * torch.linspace(0.5, 1.0, B, dtype=F64) if times == "own" else t
    z, c = states().requires_grad_(), torch.randn(B, C, dtype=F64, requires_grad=True) if context else None
    acting = 0.5 * torch.randn(B, K, dtype=F64) if control == "weights" else torch.arange(B) % K
    acting = acting.requires_grad_() if control == "weights" else acting
    has_potential = isinstance(made, P.Potential) or made.has_potential
    costs: dict[str, Any] = {"action": ff.regularizers.TransportCost()}
    if has_potential:
        costs["hj"] = ff.regularizers.HamiltonJacobi(ff.regularizers.NegativeSquare(D, generator=_seed()).double())
    inputs = [z, *flow.parameters(), *(x for x in (c, acting) if x is not None and x.requires_grad)]
    found = []
    for engine in ("closed form", "general"):
        flow.solver = replace(solver, engine=engine)
        path = flow(z, t, acting, context=c, log_det=True, costs=costs, generator=_seed())
        assert path.log_det is not None and path.stats.engine == engine, path.stats.reason
        loss = path.z.sin().sum() + path.log_det.square().sum() + sum(x.square().sum() for x in path.costs.values())
        gradients = torch.autograd.grad(loss, inputs, materialize_grads=True, allow_unused=True)
        found.append([path.z, path.log_det, *path.costs.values(), *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("name", PARTS)
def test_it_is_rebuilt_from_what_is_written_of_it(name: str) -> None:
    made = part(name)
    again = rebuild(describe(made)).double()  # type: ignore[arg-type]
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(states(), 3.0, 2), made(states(), 3.0, 2))


def test_a_part_with_time_does_not_load_weights_without() -> None:
    with pytest.raises(RuntimeError, match=r"Unexpected key.*v1"):
        part("mlp").load_state_dict(part("mlp", 4).state_dict())


def test_autocast_keeps_the_bias() -> None:
    flow = ff.LatentFlow(mlp(0), ff.Solver("euler"))
    z = states().float()
    with torch.autocast("cpu", torch.bfloat16):
        low = flow(z, [0.0, 1.0], 0).z[-1]
    torch.testing.assert_close(low.float(), flow(z, [0.0, 1.0], 0).z[-1], rtol=0.05, atol=0.05)


def parameters_of(model: nn.Module) -> set[str]:
    return {name.split(".")[-1] for name, _ in model.named_parameters()}


@pytest.mark.parametrize("field", ["helmholtz", "gradient", "free"])
@pytest.mark.parametrize("builder", [ff.models.build_vae, ff.models.build_sparse_vae])
def test_models_are_built_without_time(builder: Any, field: str, tmp_path: Any) -> None:
    sizes: dict[str, Any] = {"image_shape": (1, 8, 8), "num_flows": 2, "latent_dim": 4, "hidden": (5, 5)}
    model = builder(**sizes, field=field, time_features=0)
    times = {"v", "v1", "v2"}
    assert not parameters_of(model.flow) & times
    assert parameters_of(builder(**sizes, field=field).flow) & times
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    z = torch.randn(3, model.flow.dim)
    assert torch.equal(again.flow.velocity(z, 9.0, 1), model.eval().flow.velocity(z, 0.0, 1))


def test_a_streams_potential_is_built_without_time_too() -> None:
    how: dict[str, Any] = {"image_shape": (1, 8, 8), "num_flows": 2, "latent_dim": 4, "hidden": (5, 5)}
    how["field"] = "helmholtz"
    field = ff.models.build_vae(**how, skew="learned", time_features=0).flow.field
    assert field.solenoidal[0].potential.time_features == field.potential.time_features == 0
    own = ff.models.build_vae(**how, time_features=0, potential={"name": "mlp", "time_features": 4}).flow.field
    assert own.potential.time_features == 4 and own.solenoidal[0].time_features == 0


class Sink(P.Potential):
    def flow_potential(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return -z.square().sum(-1)


def test_parts_without_such_a_setting_are_named() -> None:
    ff.register_potential("timeless-test-sink")(Sink)
    with pytest.raises(ValueError, match="'timeless-test-sink' has no setting time_features"):
        ff.models.build_vae((1, 8, 8), field="gradient", potential="timeless-test-sink", time_features=0)
    with pytest.raises(ValueError, match="or 0 for a part without time, got 3"):
        ff.models.build_vae((1, 8, 8), time_features=3)
