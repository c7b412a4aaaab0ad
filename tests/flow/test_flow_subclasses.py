"""Which subclasses, parametrizations and hooks leave a part its closed form, and that the general engine agrees."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

import flowfactor as ff
from flowfactor.networks.batching import Layout
from flowfactor.networks.stage_adjoint import NoClosedForm, StageAdjoint

D, K = 4, 3
Part = ff.fields.Field | ff.potentials.Potential


class EmptyMLP(ff.potentials.MLPPotential):
    """Nothing new."""


class EmptyPaper(ff.potentials.PaperPotential):
    """Nothing new."""


class EmptyFree(ff.fields.FreeField):
    """Nothing new but a method that no evaluation calls."""

    def name(self) -> str:
        return "free"


class EmptySolenoidal(ff.fields.SolenoidalField):
    """Nothing new."""


class EmptyGradient(ff.fields.GradientField):
    """Nothing new."""


class EmptySkew(ff.fields.SkewGradientField):
    """Nothing new."""


class EmptyHelmholtz(ff.fields.HelmholtzField):
    """Nothing new."""


def mlp(kind: type[ff.potentials.MLPPotential] = ff.potentials.MLPPotential) -> ff.potentials.MLPPotential:
    return kind(D, K, (6, 5), rank=2, time_features=4, init_scale=1.5)


def free(kind: type[ff.fields.FreeField] = ff.fields.FreeField) -> ff.fields.FreeField:
    return kind(D, K, (6, 5), rank=2, time_features=4, init_scale=1.5)


def solenoidal(kind: type[ff.fields.SolenoidalField] = ff.fields.SolenoidalField) -> ff.fields.SolenoidalField:
    return kind(D, K, 7, rank=2, time_features=4, init_scale=1.5)


EMPTY: dict[str, Callable[[], Part]] = {
    "mlp": lambda: mlp(EmptyMLP),
    "paper": lambda: EmptyPaper(D, K),
    "free": lambda: free(EmptyFree),
    "solenoidal": lambda: solenoidal(EmptySolenoidal),
    "gradient": lambda: EmptyGradient(mlp()),
    "skew": lambda: EmptySkew(mlp(EmptyMLP)),
    "helmholtz": lambda: EmptyHelmholtz(mlp(), mlp(EmptyMLP), solenoidal(EmptySolenoidal)),
}


def adjoint_of(part: Part) -> StageAdjoint | NoClosedForm:
    """What a solve of one flow would be given."""
    field = ff.LatentFlow(part).field
    return field.stage_adjoint(Layout((2,), [1]), frozenset(), None, None)


def solved(part: Part, gradient: str = "direct", log_det: bool = True, engine: str = "auto") -> list[Tensor]:
    """States, log-determinants and the gradients of everything that is trained, in double precision."""
    flow = ff.LatentFlow(part, ff.Solver("rk4", step_size=0.25, gradient=gradient, engine=engine))  # type: ignore[arg-type]
    z0 = torch.randn(5, D, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    t = torch.tensor([0.0, 0.6, 1.0]).double()
    path = flow(z0, t, torch.tensor([1, 0, 2, 2, 0]), log_det=log_det)
    loss = path.z.sin().sum() + (path.log_det.cos().sum() if path.log_det is not None else 0)
    inputs = [z0, *part.parameters()]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
    return [path.z.detach(), *([] if path.log_det is None else [path.log_det.detach()]), *gradients]


def assert_fast_and_right(part: Part) -> None:
    part.double()
    assert isinstance(adjoint_of(part), StageAdjoint)
    for gradient in ("direct", "checkpoint"):
        fast, general = (solved(part, gradient, engine=engine) for engine in ("closed form", "general"))
        for a, b in zip(fast, general, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_subclass_keeps_its_closed_form(name: str) -> None:
    assert_fast_and_right(EMPTY[name]())


class Doubled(nn.Module):
    """A parametrization with a tensor that is trained too."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def weight_norm(part: nn.Module, name: str) -> None:
    parametrizations.weight_norm(part, name, dim=1)


def orthogonal(part: nn.Module, name: str) -> None:
    parametrizations.orthogonal(part, name)


def doubled(part: nn.Module, name: str) -> None:
    register_parametrization(part, name, Doubled())


def pruned(part: nn.Module, name: str) -> None:
    prune.l1_unstructured(part, name, amount=0.4)


def pruned_twice(part: nn.Module, name: str) -> None:
    prune.l1_unstructured(part, name, amount=0.2)
    prune.random_unstructured(part, name, amount=0.2)


CHANGES = {f.__name__: f for f in (weight_norm, orthogonal, doubled, pruned, pruned_twice)}
PLACES: dict[str, tuple[Callable[[], Part], Callable[[Any], nn.Module], str]] = {
    "mlp": (mlp, lambda part: part, "w2"),
    "paper": (lambda: ff.potentials.PaperPotential(D, K), lambda part: part, "w1"),
    "free": (free, lambda part: part, "w1"),
    "solenoidal": (solenoidal, lambda part: part, "r"),
    "helmholtz": (lambda: ff.fields.HelmholtzField(mlp(), mlp()), lambda part: part.potential, "quad"),
    "skew": (lambda: ff.fields.SkewGradientField(mlp()), lambda part: part.potential, "w1"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", PLACES)
def test_parametrized_and_pruned_weights_keep_the_closed_form(place: str, change: str) -> None:
    make, inside, name = PLACES[place]
    part = make().double()
    CHANGES[change](inside(part), name)
    assert_fast_and_right(part)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weight_norm_in_the_style_of_hooks_keeps_the_closed_form() -> None:
    part = mlp().double()
    torch.nn.utils.weight_norm(part, "w1", dim=1)
    assert_fast_and_right(part)


@pytest.mark.parametrize("kind", ["mlp", "own"])
def test_a_solve_sees_pruned_weights_as_training_changed_them(kind: str) -> None:
    class Own(ff.potentials.Potential):
        def __init__(self) -> None:
            super().__init__(D, K)
            self.w2 = nn.Parameter(torch.eye(D))

        def flow_potential(self, z: Tensor, t: Tensor, k: int) -> Tensor:
            return ((z @ self.w2) * z).sum(-1)

    part = mlp() if kind == "mlp" else Own()
    prune.l1_unstructured(part, "w2", amount=0.4)
    part.double()
    first = solved(part)[0]
    with torch.no_grad():
        part.w2_orig.mul_(2.0)
    assert not torch.allclose(solved(part)[0], first)


def test_antisymmetric_maps_may_be_parametrized() -> None:
    part = ff.fields.HelmholtzField(mlp(), mlp()).double()
    register_parametrization(part.solenoidal[0].forms, "upper", Doubled().double())  # type: ignore[union-attr]
    assert_fast_and_right(part)


class OwnPotential(ff.potentials.MLPPotential):
    """Says something else than the class that it derives from, in terms of it."""

    def flow_potential(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return 2 * super().flow_potential(z, t, k) + z.square().sum(-1)


class OwnVelocity(ff.fields.FreeField):
    """Says something else than the class that it derives from, in terms of it."""

    def flow_velocity(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return 2 * super().flow_velocity(z, t, k) + z


class OwnStack(ff.potentials.MLPPotential):
    """Makes its weights otherwise."""

    def _stack(self) -> dict[str, Tensor]:
        return {name: 2 * value for name, value in super()._stack().items()}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: mlp(OwnPotential), "OwnPotential overrides flow_potential of MLPPotential"),
        (lambda: free(OwnVelocity), "OwnVelocity overrides flow_velocity of FreeField"),
        (lambda: mlp(OwnStack), "OwnStack overrides _stack of MLPPotential"),
        (lambda: ff.fields.HelmholtzField(mlp(), mlp(OwnStack)), "OwnStack overrides _stack of MLPPotential"),
        (lambda: ff.potentials.ConvexPotential(D, K), "ConvexPotential has no closed-form adjoint"),
        (lambda: ff.fields.from_module(lambda z, t: -z, D), "ModuleField has no closed-form adjoint"),
    ],
)
def test_what_has_no_closed_form_says_why(make: Callable[[], Part], reason: str) -> None:
    refusal = adjoint_of(make())
    assert isinstance(refusal, NoClosedForm) and refusal.reason.startswith(reason)


def test_what_a_subclass_says_of_its_potential_holds_though_it_derives_from_closed_forms() -> None:
    own = mlp(OwnPotential).double()
    plain = mlp().double()
    plain.load_state_dict(own.state_dict())
    z, t, k = torch.randn(5, D).double(), 0.3, torch.tensor([1, 0, 2, 2, 0])
    a, b = own.derivatives(z, t, k, "exact"), plain.derivatives(z, t, k, "exact")
    assert a.gradient is not None and a.laplacian is not None and b.gradient is not None and b.laplacian is not None
    torch.testing.assert_close(a.gradient, 2 * b.gradient + 2 * z)
    torch.testing.assert_close(a.laplacian, 2 * b.laplacian + 2 * D)
    path = ff.LatentFlow(own, ff.Solver("euler"))(z, [0.0, 1.0], k)
    torch.testing.assert_close(path.z[1], z + ff.fields.GradientField(own)(z, 0.0, k))


def test_what_a_subclass_says_of_its_velocity_holds_though_it_derives_from_closed_forms() -> None:
    own = free(OwnVelocity).double()
    plain = free().double()
    plain.load_state_dict(own.state_dict())
    z, k = torch.randn(5, D).double(), torch.tensor([1, 0, 2, 2, 0])
    torch.testing.assert_close(own(z, 0.3, k), 2 * plain(z, 0.3, k) + z)
    torch.testing.assert_close(own.divergence(z, 0.3, k), 2 * plain.divergence(z, 0.3, k) + D)
    path = ff.LatentFlow(own, ff.Solver("euler"))(z, [0.0, 1.0], k)
    torch.testing.assert_close(path.z[1], z + own(z, 0.0, k))


def test_a_method_replaced_on_an_instance_is_not_passed_over() -> None:
    part = mlp().double()
    z = torch.randn(5, D).double()
    plain = ff.LatentFlow(part, ff.Solver("euler"))(z, [0.0, 1.0], 1).z[1]
    original = part._bind_stack

    def doubled(*arguments: Any) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        bound = original(*arguments)
        return lambda z, t: {name: 2 * value for name, value in bound(z, t).items()}

    part._bind_stack = doubled  # type: ignore[method-assign]
    refusal = adjoint_of(part)
    assert isinstance(refusal, NoClosedForm) and "_bind_stack of this MLPPotential was replaced" in refusal.reason
    path = ff.LatentFlow(part, ff.Solver("euler"))(z, [0.0, 1.0], 1)
    torch.testing.assert_close(path.z[1] - z, 2 * (plain - z))


def with_hook(part: Any) -> None:
    part.register_forward_hook(lambda module, arguments, output: 2 * output)


def with_pre_hook(part: Any) -> None:
    part.register_forward_pre_hook(lambda module, arguments: None)


def with_own_forward(part: Any) -> None:
    part.forward = lambda z, t, control=0: z.sum(-1)


def with_own_potential(part: Any) -> None:
    part.flow_potential = lambda z, t, k: z.sum(-1)


@pytest.mark.parametrize("change", [with_hook, with_pre_hook, with_own_forward, with_own_potential])
@pytest.mark.parametrize("where", ["alone", "in a field"])
def test_what_a_solve_ignores_it_warns_of(change: Callable[[Any], None], where: str) -> None:
    part = mlp()
    whole = part if where == "alone" else ff.fields.HelmholtzField(mlp(), part)
    change(part)
    with pytest.warns(UserWarning, match="a solve ignores .*MLPPotential"):
        ff.LatentFlow(whole)(torch.zeros(2, D), [0.0, 1.0])


def test_a_subclass_with_another_forward_is_warned_of() -> None:
    class Mine(ff.potentials.MLPPotential):
        def forward(self, z: Tensor, t: float | Tensor, control: Any = 0) -> Tensor:
            return 2 * super().forward(z, t, control)

    with pytest.warns(UserWarning, match="a solve ignores forward of Mine"):
        ff.LatentFlow(mlp(Mine))(torch.zeros(2, D), [0.0, 1.0])


def test_a_subclass_that_binds_what_its_forward_says_is_not_warned_of() -> None:
    class Mine(ff.potentials.MLPPotential):
        def forward(self, z: Tensor, t: float | Tensor, control: Any = 0) -> Tensor:
            return super().forward(z, t, control)

        def bind(self, *arguments: Any, **options: Any) -> Any:
            return super().bind(*arguments, **options)

    class Own(ff.potentials.Potential):
        def flow_potential(self, z: Tensor, t: Tensor, k: int) -> Tensor:
            return z.square().sum(-1)

    own = Own(D)
    own.flow_potential = lambda z, t, k: -z.square().sum(-1)  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ff.LatentFlow(mlp(Mine))(torch.zeros(2, D), [0.0, 1.0])
        path = ff.LatentFlow(own, ff.Solver("euler"))(torch.ones(2, D), [0.0, 1.0])
    torch.testing.assert_close(path.z[1], -torch.ones(2, D))


def test_changed_time_features_leave_the_closed_form() -> None:
    part = mlp()
    part.features.register_forward_hook(lambda module, arguments, output: output)
    refusal = adjoint_of(part)
    assert isinstance(refusal, NoClosedForm) and "time features" in refusal.reason


class EmptyResidual(ff.regularizers.HamiltonJacobi):
    """Nothing new."""


class EmptyForce(ff.regularizers.NegativeSquare):
    """Nothing new."""


class OtherForce(ff.regularizers.NegativeSquare):
    """Another force."""

    def forward(self, z: Tensor, t: float | Tensor) -> Tensor:
        return 2 * super().forward(z, t)


def test_costs_that_change_nothing_take_many_stages_and_others_say_why_not() -> None:
    assert EmptyResidual(EmptyForce(D)).many_stages
    assert ff.regularizers.TransportCost().many_stages
    for force, reason in (
        (lambda z, t: z.sum(-1), "its force is a function"),
        (OtherForce(D), "OtherForce overrides forward of NegativeSquare"),
    ):
        cost = ff.regularizers.HamiltonJacobi(force)
        assert not cost.many_stages and (cost.one_stage_reason or "").startswith(reason)
    hooked = ff.regularizers.TransportCost()
    hooked.register_forward_hook(lambda module, arguments, output: 2 * output)
    assert not hooked.many_stages and "hooks" in (hooked.one_stage_reason or "")
