"""Which engine solved a flow: what a path says of it, and the switch that chooses it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfactor as ff
from flowfactor.solve import solve as engine
from flowfactor.solve.closed_form import FAILED
from flowfactor.solve.runge_kutta import tableau

D, K = 3, 2
Z = torch.linspace(-1, 1, 4 * D).reshape(4, D)
INDEX = torch.tensor([0, 1, 1, 0])
WEIGHTS = torch.full((4, K), 0.5)


def potential() -> ff.potentials.MLPPotential:
    return ff.potentials.MLPPotential(D, K, (6, 5), time_features=4, init_scale=1.5)


def follow(
    solver: ff.Solver | None = None, field: Any = None, z: Tensor = Z, t: Any = (0.0, 0.5, 1.0), control: Any = INDEX,
    **rest: Any,
) -> ff.FlowPath:  # fmt: skip
    return ff.LatentFlow(potential() if field is None else field, solver or ff.Solver("rk4"))(z, t, control, **rest)


class Own(ff.potentials.Potential):
    """A potential of the user's own, of which only the value is known."""

    def flow_potential(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return -0.5 * z.square().sum(-1)


class Still(ff.fields.Field):
    """A field of the user's own."""

    def flow_velocity(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return torch.zeros_like(z)


class Renamed(ff.potentials.MLPPotential):
    """Nothing is overridden."""


class RenamedCost(ff.regularizers.TransportCost):
    """Nothing is overridden."""


class Doubled(ff.potentials.MLPPotential):
    """The evaluation is overridden: a closed form would be wrong of it."""

    def bind(self, *arguments: Any, **rest: Any) -> Any:
        bound = super().bind(*arguments, **rest)
        return lambda z, t: type(d := bound(z, t))(**{k: v if v is None else 2 * v for k, v in vars(d).items()})


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "euler", "midpoint", "heun2", "heun3", "rk4"])
def test_a_solve_in_closed_form_says_so_and_needs_no_reason(method: str, gradient: ff.solver.Gradient) -> None:
    stats = follow(
        ff.Solver(method, gradient=gradient), log_det=True, costs={"a": ff.regularizers.TransportCost()}
    ).stats
    assert (stats.engine, stats.reason) == ("closed form", "")


REASONS: dict[str, tuple[Callable[[], ff.FlowPath], str]] = {
    "asked for": (lambda: follow(ff.Solver("rk4", engine="general")), 'Solver(engine="general")'),
    "a potential of one's own": (lambda: follow(field=Own(D, K)), "Own"),
    "a field of one's own": (
        lambda: follow(field=Still(D, K)),
        "Still",
    ),
    "an overridden evaluation": (lambda: follow(field=Doubled(D, K)), "Doubled overrides bind of"),
    "a force": (
        lambda: follow(costs={"hj": ff.regularizers.HamiltonJacobi(lambda z, t: -z.square().sum(-1))}),
        "cost 'hj' takes one stage at a time: its force is a function",
    ),
    "a cost": (
        lambda: follow(costs={"mine": lambda e: e.z.sum(-1)}),
        "cost 'mine' takes one stage at a time: it does not promise many_stages",
    ),
    "options": (lambda: follow(ff.Solver("euler", options={"perturb": True})), "options"),
    "a method": (lambda: follow(ff.Solver("explicit_adams", step_size=0.1)), "explicit_adams"),
    "gradients of times": (lambda: follow(t=torch.tensor([0.0, 1.0], requires_grad=True)), "times"),
    "few samples of a flow": (
        lambda: follow(z=Z.repeat(9, 1), control=torch.tensor([1] + [0] * 35)),
        "different numbers of samples",
    ),
    "few steps under weights": (lambda: follow(ff.Solver("euler"), t=[0.0, 1.0], control=WEIGHTS), "few steps"),
    "half precision": (lambda: follow(z=Z.bfloat16(), field=potential().bfloat16()), "bfloat16"),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_general_engine_says_why_it_ran(case: str) -> None:
    run, word = REASONS[case]
    stats = run().stats
    assert stats.engine == "general"
    assert word in stats.reason


def test_subclasses_that_override_nothing_and_parametrizations_take_the_closed_form() -> None:
    parametrized = potential()
    torch.nn.utils.parametrizations.weight_norm(parametrized, "w1")
    for field in (Renamed(D, K), parametrized):
        stats = follow(field=field, costs={"cost": RenamedCost()}).stats
        assert (stats.engine, stats.reason) == ("closed form", "")


def test_a_force_may_promise_to_take_many_stages() -> None:
    class Promised(torch.nn.Module):
        many_stages = True

        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return -z.square().sum(-1)

    made = potential()
    runs = [
        follow(field=made, costs={"hj": ff.regularizers.HamiltonJacobi(force)})
        for force in (Promised(), lambda z, t: -z.square().sum(-1))
    ]
    assert [path.stats.engine for path in runs] == ["closed form", "general"]
    torch.testing.assert_close(runs[0].costs["hj"], runs[1].costs["hj"])


def test_autocast_is_a_reason() -> None:
    with torch.autocast("cpu"):
        stats = follow().stats
    assert (stats.engine, stats.reason) == ("general", "autocast is on")


def test_transforms_of_functions_are_a_reason() -> None:
    found: list[ff.SolveStats] = []

    def end(z: Tensor) -> Tensor:
        path = follow(z=z)
        found.append(path.stats)
        return path.z[-1].sum()

    torch.func.grad(end)(Z)
    assert found[0].engine == "general" and "torch.func" in found[0].reason


def test_compiling_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **settings: f)
    stats = follow(ff.Solver("rk4", compile=True)).stats
    assert stats.engine == "general" and "compile" in stats.reason


def test_stretches_may_be_solved_by_different_engines() -> None:
    steps = ff.Solver("euler", step_size=0.5)
    one = ff.Schedule([(0.0, 1), (1.0, torch.tensor([1, 0, 0, 0]))])
    path = follow(steps, t=[0.0, 1.0, 2.0], control=one, z=Z)
    assert path.stats.engine == "mixed" and "different numbers of samples" in path.stats.reason
    again = follow(steps, t=[0.0, 1.0, 2.0], control=ff.Schedule([(0.0, 1), (1.0, INDEX)]))
    assert (again.stats.engine, again.stats.reason) == ("closed form", "")


def test_a_reason_is_said_once() -> None:
    schedule = ff.Schedule([(float(i), i % K) for i in range(4)])
    assert follow(t=[0.0, 4.0], control=schedule, field=Own(D, K)).stats.reason.count("Own") == 1


def test_nothing_to_solve_names_no_engine() -> None:
    for path in (follow(t=[0.0]), follow(z=Z[:0], control=0)):
        assert (path.stats.engine, path.stats.reason) == ("", "")


@pytest.mark.parametrize("solver", [ff.Solver("rk4"), ff.Solver("dopri5"), ff.Solver("rk4", gradient="checkpoint")])
def test_gradients_of_gradients_are_said_to_be_of_the_general_engine(solver: ff.Solver) -> None:
    z = Z.clone().requires_grad_()
    path = follow(solver, z=z)
    assert path.stats.reason_backward == ""
    (first,) = torch.autograd.grad(path.z[-1].sum(), z, create_graph=True)
    assert path.stats.engine == "closed form" and path.stats.reason_backward == "gradients of gradients were asked for"
    first.sum().backward()


def test_plain_gradients_give_no_reason() -> None:
    z = Z.clone().requires_grad_()
    path = follow(z=z)
    path.z[-1].sum().backward()
    assert path.stats.reason_backward == ""


DEMANDED: Mapping[str, Callable[[ff.Solver], ff.FlowPath]] = {
    "a potential of one's own": lambda solver: follow(solver, Own(D, K)),
    "a cost": lambda solver: follow(solver, costs={"mine": lambda e: e.z.sum(-1)}),
    "gradients of times": lambda solver: follow(solver, t=torch.tensor([0.0, 1.0], requires_grad=True)),
    "half precision": lambda solver: follow(solver, potential().bfloat16(), Z.bfloat16()),
}


@pytest.mark.parametrize("case", DEMANDED)
def test_a_demanded_closed_form_is_refused_with_the_reason(case: str) -> None:
    with pytest.raises(ValueError, match="cannot do this solve: ") as caught:
        DEMANDED[case](ff.Solver("rk4", engine="closed form"))
    assert REASONS[case][1] in str(caught.value) and 'engine="auto"' in str(caught.value)


def test_a_demanded_closed_form_takes_superpositions_of_few_steps() -> None:
    flow = ff.LatentFlow(potential(), ff.Solver("euler", engine="closed form"))
    path = flow(Z, [0.0, 1.0], WEIGHTS)
    assert path.stats.engine == "closed form"
    torch.testing.assert_close(path.z[-1], Z + flow.velocity(Z, 0.0, WEIGHTS))


def test_what_fails_in_closed_form_is_explained_by_the_general_engine() -> None:
    engines: tuple[ff.solver.EngineChoice, ...] = ("auto", "closed form", "general")
    broken, messages = potential(), set()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    for which in engines:
        with pytest.raises(ff.FlowSolveError) as caught:
            follow(ff.Solver("rk4", engine=which), broken)
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_what_fails_in_closed_form_alone_is_solved_by_the_general_engine_unless_that_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "solve_segment", lambda *_, **_more: FAILED)
    stats = follow().stats
    assert (stats.engine, stats.reason) == ("general", FAILED.reason)
    with pytest.raises(ValueError, match=FAILED.reason):
        follow(ff.Solver("rk4", engine="closed form"))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"engine": "torchdiffeq"}, 'engine must be "auto", "general" or "closed form", got \'torchdiffeq\''),
        ({"engine": None}, "engine must be"),
        ({"engine": "closed form", "compile": True}, "does not go with compile=True"),
        ({"engine": "closed form", "options": {"perturb": True}, "method": "rk4"}, "does not go with options="),
        ({"engine": "closed form", "method": "adaptive_heun"}, "goes with dopri5, .*; got method='adaptive_heun'"),
    ],
)
def test_a_switch_that_cannot_be_is_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ff.Solver(**settings)


@pytest.mark.parametrize("method", ff.solver.SOLVER_METHODS)
def test_methods_of_closed_forms_are_those_with_independent_steps(method: str) -> None:
    assert (tableau(method) is not None) == (method in ff.solver.CLOSED_FORM_METHODS)


def test_a_model_keeps_its_engine_and_one_saved_without_loads(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    settings = {"method": "rk4", "step_size": 1.0, "engine": "general"}
    model = ff.models.build_vae((1, 8, 8), K, 4, solver=settings, hidden=(8, 8))
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).flow.solver == ff.Solver("rk4", step_size=1.0, engine="general")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["parts"]["flow"]["solver"]["engine"]  # as releases before it wrote them
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(model).from_pretrained(tmp_path).flow.solver.engine == "auto"
