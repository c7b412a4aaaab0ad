"""Helmholtz fields of which some flows are gradients alone, exactly, whatever path a solve takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import product
from torch import Tensor

import flowfactor as ff

F, P = ff.fields, ff.potentials
D, K, N, TURNING = 4, 3, 6, (0, 2)
LINE = 1  # the flow that does not turn


def streams(kind: str, context: int = 0) -> tuple[Any, ...]:
    def make() -> P.MLPPotential:
        return P.MLPPotential(D, K, (6, 5), rank=2, time_features=4, init_scale=1.5, context=context)

    if kind == "ridge":
        return make(), F.SolenoidalField(D, K, 7, rank=2, time_features=4, init_scale=1.5, context=context)
    return make(), make(), *([make()] if kind == "canonical" else [])


def build(kind: str, turning: Any = TURNING, context: int = 0) -> F.HelmholtzField:
    torch.manual_seed(3)
    skew = "canonical" if kind == "canonical" else "learned"
    return F.HelmholtzField(*streams(kind, context), skew=skew, turning=turning).double()


class Reference(F.Field):
    """The same field said plainly: the gradient, and the streams of the flows that turn."""

    def __init__(self, field: F.HelmholtzField) -> None:
        super().__init__(D, K)
        self.field = field

    def flow_velocity(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        gradient = self.field.irrotational(z, t, k)
        return gradient + sum(part(z, t, k) for part in self.field.solenoidal) if k in TURNING else gradient


def controls() -> dict[str, ff.Control]:
    torch.manual_seed(5)
    weights = torch.randn(N, K).double()
    return {
        "line": LINE,
        "index": torch.tensor([0, 1, 2, 1, 0, 2]),
        "lines": torch.full((N,), LINE),
        "weights": weights,
        "schedule": ff.Schedule([(0.0, LINE), (0.6, weights), (1.1, torch.tensor([1, 1, 0, 2, 2, 0]))]),
    }


kinds = pytest.mark.parametrize("kind", ["ridge", "learned", "canonical"])


@kinds
def test_velocities_of_lines_are_the_gradient_and_those_of_circles_are_untouched(kind: str) -> None:
    field, plain, z = build(kind), build(kind, None), torch.randn(N, D).double()
    assert torch.equal(field(z, 0.3, LINE), field.irrotational(z, 0.3, LINE))
    assert not torch.equal(plain(z, 0.3, LINE), field(z, 0.3, LINE))
    for k in TURNING:
        assert torch.equal(field(z, 0.3, k), plain(z, 0.3, k))
    for control in controls().values():
        torch.testing.assert_close(field(z, 0.3, control), Reference(field)(z, 0.3, control), rtol=1e-12, atol=1e-12)
    curl = torch.func.vmap(torch.func.jacrev(lambda x: field(x, 0.3, LINE)))(z)
    torch.testing.assert_close(curl, curl.mT, rtol=0, atol=1e-12)


@product(
    kind=["ridge", "learned", "canonical"],
    control=list(controls()),
    gradient=["direct", "checkpoint", "adjoint"],
    engine=["general", "closed form"],
)
def test_solves_and_gradients_are_those_of_the_field_said_plainly(
    kind: str, control: str, gradient: str, engine: str
) -> None:
    field = build(kind)
    z0, t = torch.randn(N, D).double().requires_grad_(), [0.0, 0.5, 1.5]
    mine = dict(field.named_parameters())
    found = []
    for one, how in ((field, engine), (Reference(field), "general")):
        flow = ff.LatentFlow(one, ff.Solver("midpoint", step_size=0.5, gradient=gradient, engine=how))
        path = flow(z0, t, controls()[control], log_det=True)
        loss = path.z.sin().sum() + path.log_det.square().sum()
        grads = torch.autograd.grad(loss, [z0, *mine.values()], allow_unused=True)
        found.append((path, grads))
    (path, grads), (other, wanted) = found
    torch.testing.assert_close(path.z, other.z, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(path.log_det, other.log_det, rtol=1e-8, atol=1e-9)
    for name, a, b in zip(["z0", *mine], grads, wanted, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * float(b.abs().max() + 1), msg=name)
    for name, a in zip(mine, grads[1:], strict=True):
        if name.startswith("solenoidal"):  # zero, not missing: optimizers and DistributedDataParallel ask for each
            assert a is not None and not a[LINE].any(), name


@kinds
@pytest.mark.parametrize("engine", ["general", "auto"])
def test_without_gradients_a_line_is_solved_as_the_gradient_alone(
    kind: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    field, z = build(kind), torch.randn(N, D).double()
    solver = ff.Solver("dopri5", engine=engine)
    with torch.no_grad():
        wanted = ff.LatentFlow(field.irrotational, solver)(z, [0.0, 2.0], LINE, log_det=True)
        for part in field.solenoidal:
            monkeypatch.setattr(part, "bind_velocity", None)  # whoever asks fails
            monkeypatch.setattr(part, "closed_form", None)
        for control in (LINE, torch.full((N,), LINE)) if engine == "auto" else (LINE,):
            path = ff.LatentFlow(field, solver)(z, [0.0, 2.0], control, log_det=True)
            assert torch.equal(path.z, wanted.z) and torch.equal(path.log_det, wanted.log_det)
    with pytest.raises(TypeError):
        ff.LatentFlow(field, solver)(z, [0.0, 2.0], 2)


def test_a_context_steers_the_turning_flows_alone_in_their_streams() -> None:
    field, plain = build("ridge", context=2), build("ridge", None, context=2)
    z, c = torch.randn(N, D).double(), torch.randn(N, 2).double()
    for one in (LINE, 0):
        same = torch.equal(field(z, 0.3, one, context=c), plain(z, 0.3, one, context=c))
        assert same == (one in TURNING)
    path = ff.LatentFlow(field)(z, [0.0, 1.0], LINE, context=c)
    alone = ff.LatentFlow(field.irrotational)(z, [0.0, 1.0], LINE, context=c)
    torch.testing.assert_close(path.z, alone.z, rtol=0, atol=1e-12)


@kinds
def test_lie_brackets_and_second_gradients_pass_through(kind: str) -> None:
    field, z = build(kind), torch.randn(N, D).double().requires_grad_()
    commutator = ff.regularizers.Commutator()
    torch.testing.assert_close(commutator(field, z, 0.3), commutator(Reference(field), z, 0.3))
    path = ff.LatentFlow(field, ff.Solver("rk4"))(z, [0.0, 1.0], controls()["index"])
    (first,) = torch.autograd.grad(path.z[-1].square().sum(), z, create_graph=True)
    first.square().sum().backward()
    assert all(p.grad is not None and not p.grad[LINE].any() for p in field.solenoidal.parameters())


def test_a_stream_of_ones_own_goes_by_its_velocity() -> None:
    class Swirl(F.SolenoidalField):
        def bind_velocity(self, control: Any, batch_shape: Any) -> Any:
            velocity = super().bind_velocity(control, batch_shape)
            return lambda z, t: 2 * velocity(z, t)

    torch.manual_seed(0)
    field = F.HelmholtzField(P.MLPPotential(D, K), Swirl(D, K), turning=TURNING).double()
    z = torch.randn(N, D).double()
    path = ff.LatentFlow(field)(z, [0.0, 1.0], controls()["index"])
    assert path.stats.engine == "general"
    torch.testing.assert_close(path.z, ff.LatentFlow(Reference(field))(z, [0.0, 1.0], controls()["index"]).z)


def test_a_closed_form_that_does_not_name_its_last_weights_is_not_masked_by_guess() -> None:
    class Quiet(F.SolenoidalField):
        def closed_form(self, *asked: Any) -> Any:
            form = super().closed_form(*asked)
            form.outputs = ()
            return form

    field = F.HelmholtzField(P.MLPPotential(D, K), Quiet(D, K), turning=TURNING)
    path = ff.LatentFlow(field)(torch.randn(N, D), [0.0, 1.0], controls()["index"])
    assert path.stats.engine == "general" and "does not say which of its weights" in path.stats.reason


def test_the_setting_is_kept_and_the_weights_are_those_of_any_helmholtz_field(tmp_path: Path) -> None:
    field, plain = build("ridge"), build("ridge", None)
    assert field.turning == TURNING and plain.turning is None
    assert field.state_dict().keys() == plain.state_dict().keys()
    model = ff.models.build_vae((1, 8, 8), 3, 4, hidden=(5, 5), field="helmholtz", turning=[2, 0]).eval()
    again = ff.models.FlowFactorizedVAE.from_pretrained(model.save_pretrained(tmp_path))
    assert again.flow.field.turning == TURNING and again.config() == model.config()
    assert model.config()["parts"]["flow"]["field"]["arguments"]["turning"] == [0, 2]
    x = torch.rand(2, 1, 8, 8)
    for k in range(3):
        torch.testing.assert_close(again.transform(x, [0.0, 1.0], k), model.transform(x, [0.0, 1.0], k))


@pytest.mark.parametrize(
    ("turning", "error", "said"),
    [
        ([], ValueError, "leaves no flow a divergence-free part: take a GradientField"),
        ([3], ValueError, "must name flows from 0 to 2, each once, for 3 flows; got"),
        ([-1], ValueError, "must name flows from 0 to 2"),
        ([1, 1], ValueError, "each once"),
        (["rotation"], TypeError, "must be a list of flows by their index"),
        ([True], TypeError, "must be a list of flows by their index"),
        (1, TypeError, "must be a list of flows by their index"),
        ("12", TypeError, "must be a list of flows by their index"),
    ],
)
def test_what_is_no_list_of_flows_is_refused(turning: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        build("ridge", turning)
