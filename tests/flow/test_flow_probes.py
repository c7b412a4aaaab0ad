"""Several probes for Hutchinson's estimate: the mean of single ones, in every part, engine and gradient mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import product
from constructors import FIELDS, POTENTIALS
from torch import Tensor

import flowfactor as ff

D, K, P, N = 4, 3, 3, 6
PARTS: dict[str, Any] = {**FIELDS, **POTENTIALS}
CONTROLS: dict[str, Any] = {
    "int": 1,
    "index": torch.tensor([2, 0, 1, 1, 0, 2]),
    "weights": torch.tensor([[0.2, 0.5, 1.0], [1.0, 0.0, -0.3]]).repeat(3, 1).double(),
}


def made(name: str) -> Any:
    part = PARTS[name]().double()
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return part


def solved(part: Any, solver: ff.Solver, control: Any, probes: int, generator: torch.Generator) -> list[Tensor]:
    """Log-determinants, and the gradients of their weighted sum and that of the states."""
    flow = ff.LatentFlow(part, solver, "hutchinson", probes=probes)
    z = torch.linspace(-1, 1, N * D).reshape(N, D).double().requires_grad_()
    path = flow(z, [0.0, 0.4, 1.0], control, log_det=True, generator=generator)
    assert path.log_det is not None
    bar = torch.linspace(-1, 2, path.log_det.numel()).reshape(path.log_det.shape).double()
    leaves = [z, *(p for p in part.parameters() if p.requires_grad)]
    found = torch.autograd.grad((path.log_det * bar).sum() + path.z.square().sum(), leaves, allow_unused=True)
    return [
        path.log_det.detach(),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)),
    ]


def mean_of_singles(part: Any, solver: ff.Solver, control: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)  # one after the other they draw what all draw at once
    each = [solved(part, solver, control, 1, generator) for _ in range(P)]
    return [torch.stack(x).mean(0) for x in zip(*each, strict=True)]


@product(name=list(PARTS), control=list(CONTROLS), engine=["auto", "general"])
def test_log_determinants_and_gradients_are_the_mean_of_single_probes(name: str, control: str, engine: Any) -> None:
    part, solver = made(name), ff.Solver("rk4", step_size=0.5, engine=engine)
    several = solved(part, solver, CONTROLS[control], P, torch.Generator().manual_seed(5))
    torch.testing.assert_close(several, mean_of_singles(part, solver, CONTROLS[control]))


@product(
    name=["mlp", "paper", "free", "helmholtz"], gradient=["direct", "checkpoint", "adjoint"], control=list(CONTROLS)
)
def test_gradient_modes_of_closed_forms_agree_with_the_general_engine(name: str, gradient: Any, control: str) -> None:
    part = made(name)
    how = {"rtol": 1e-10, "atol": 1e-10, "gradient": gradient}
    found, expected = (
        solved(part, ff.Solver("dopri5", engine=engine, **how), CONTROLS[control], P, torch.Generator().manual_seed(2))
        for engine in ("closed form", "general")
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "resnet", "paper", "user", "free"])
def test_gradients_of_gradients_go_through_several_probes(name: str) -> None:
    part = made(name)
    flow = ff.LatentFlow(part, ff.Solver("euler", step_size=0.5), "hutchinson", probes=2)

    def log_det(z: Tensor) -> Tensor:
        return flow(z, [0.0, 1.0], 1, log_det=True, generator=torch.Generator().manual_seed(1)).log_det[-1]  # type: ignore[index]

    assert torch.autograd.gradgradcheck(log_det, torch.randn(2, D).double().requires_grad_())


@pytest.mark.parametrize("engine", ["auto", "general"])
def test_the_variance_falls_with_the_number_of_probes(engine: Any) -> None:
    S = torch.randn(D, D, generator=torch.Generator().manual_seed(0)).double()
    S = S + S.mT
    u = ff.potentials.QuadraticPotential(D, S=S).double()
    off_diagonal = S - torch.diag(S.diagonal())
    variance = 2 * float(off_diagonal.square().sum())  # of e' S e for signs e
    z = torch.zeros(20_000, D).double()
    for probes in (1, 2, 8):
        flow = ff.LatentFlow(u, ff.Solver("euler", engine=engine), "hutchinson", probes=probes)
        with torch.no_grad():
            path = flow(z, [0.0, 1.0], log_det=True, generator=torch.Generator().manual_seed(3))
        assert path.log_det is not None
        found = path.log_det[-1]
        assert abs(float(found.mean() - S.trace())) < 5 * (variance / probes / len(z)) ** 0.5
        assert float(found.var()) * probes / variance == pytest.approx(1, abs=0.06)
    estimates = u.derivatives(z, 0.0, laplacian="hutchinson", probes=4, generator=torch.Generator().manual_seed(1))
    assert estimates.laplacian is not None
    assert float(estimates.laplacian.detach().var()) * 4 / variance == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("many_stages", [True, False], ids=["closed form", "general"])
def test_costs_see_the_first_probe(many_stages: bool) -> None:
    class Seen(torch.nn.Module):
        needs = ("probe",)

        def __init__(self) -> None:
            super().__init__()
            self.many_stages = many_stages
            self.probes: list[Tensor] = []

        def forward(self, e: Any) -> Tensor:
            assert e.probe is not None and e.probe.shape == e.z.shape
            self.probes.append(e.probe.reshape(-1, N, D)[0])
            return e.probe[..., 0]

    part, seen = made("mlp"), Seen()
    z = torch.randn(N, D).double()
    flow = ff.LatentFlow(part, ff.Solver("euler"), "hutchinson", probes=P)
    path = flow(z, [0.0, 1.0], log_det=True, costs={"seen": seen}, generator=torch.Generator().manual_seed(1))
    assert path.stats.engine == ("closed form" if many_stages else "general")
    first = ff.networks.probes.draw_probes(z, P, torch.Generator().manual_seed(1))[0]
    assert torch.equal(seen.probes[0], first)
    # Where nothing is estimated one probe is drawn, and it is the same.
    flow(z, [0.0, 1.0], costs={"seen": seen}, generator=torch.Generator().manual_seed(1))
    assert torch.equal(seen.probes[-1], first)


def test_a_given_stack_of_probes_is_averaged_and_checked() -> None:
    u, z = made("mlp"), torch.randn(2, 3, D).double()
    probes = torch.randn(P, 2, 3, D).sign().double()
    each = [u.derivatives(z, 0.3, 1, "hutchinson", probe=probe).laplacian for probe in probes]
    together = u.derivatives(z, 0.3, 1, "hutchinson", probe=probes).laplacian
    torch.testing.assert_close(together, torch.stack(each).mean(0))
    torch.testing.assert_close(
        ff.fields.GradientField(u).divergence(z, 0.3, 1, "hutchinson", probes), torch.stack(each).mean(0)
    )
    alone = u.derivatives(z, 0.3, 1, "hutchinson", probe=probes[:1]).laplacian
    torch.testing.assert_close(alone, each[0])
    for wrong in (probes[:, :1], probes[:0], probes.float(), probes.unsqueeze(0)):
        with pytest.raises(ValueError, match="probe must match the state"):
            u.derivatives(z, 0.3, 1, "hutchinson", probe=wrong)
        with pytest.raises(ValueError, match="probe must match the state"):
            ff.fields.GradientField(u).divergence(z, 0.3, 1, "hutchinson", wrong)


def test_numbers_of_probes_that_cannot_be_are_refused() -> None:
    u = made("mlp")
    for wrong, kind, error, message in (
        (0, "hutchinson", ValueError, "at least 1"),
        (2.0, "hutchinson", TypeError, "whole number"),
        (True, "hutchinson", TypeError, "whole number"),
        (2, "exact", ValueError, "2 probes are for the estimate"),
    ):
        with pytest.raises(error, match=message):
            ff.LatentFlow(u, None, kind, probes=wrong)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            u.derivatives(torch.randn(2, D).double(), 0.0, 0, kind, probes=wrong)  # type: ignore[arg-type]
    z = torch.randn(2, D).double()
    with pytest.raises(ValueError, match="2 probes are for the estimate"):
        u.derivatives(z, 0.0, probes=2)
    with pytest.raises(ValueError, match="to be drawn"):
        u.derivatives(z, 0.0, 0, "hutchinson", probe=torch.ones_like(z), probes=2)


def test_the_identity_map_estimates_with_all_probes() -> None:
    flow = ff.LatentFlow(made("mlp"), ff.Solver("rk4"), "hutchinson", probes=P)
    t1 = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z = torch.randn(N, D).double()
    there = ff.FlowTransform(flow, 0.5, t1, 1, generator=torch.Generator().manual_seed(4))
    (slope,) = torch.autograd.grad(there.log_abs_det_jacobian(z, there(z)).sum(), t1)
    generator = torch.Generator().manual_seed(4)
    _, probes = (ff.networks.probes.draw_probes(z, P, generator) for _ in range(2))  # for the states, for the density
    torch.testing.assert_close(slope, flow.field.divergence(z, 0.5, 1, "hutchinson", probes).sum())


def test_a_kept_solve_does_not_count_for_another_number_of_probes() -> None:
    flow = ff.LatentFlow(made("mlp"), ff.Solver("rk4"), "hutchinson", probes=P)
    there = flow.transform(0.0, 1.0, 1, generator=torch.Generator().manual_seed(4))
    z = torch.randn(N, D).double()
    flow.probes = 1
    end = there(z)
    flow.probes = P
    again = there.log_abs_det_jacobian(z, end)
    probes = torch.Generator().manual_seed(4)
    ff.networks.probes.draw_probes(z, 1, probes)  # the solve to the end
    expected = flow(z, [0.0, 1.0], 1, log_det=True, generator=probes).log_det
    assert expected is not None
    torch.testing.assert_close(again, expected[-1])


def test_a_saved_model_keeps_its_number_of_probes(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_flows": 2, "latent_dim": 4, "hidden": (6, 5)}
    model = ff.models.build_vae((1, 16, 16), **sizes, divergence="hutchinson", probes=3)
    assert model.flow.probes == 3
    model.save_pretrained(tmp_path / "vae")
    assert type(model).from_pretrained(tmp_path / "vae").flow.probes == 3
    sparse = ff.models.build_sparse_vae((1, 16, 16), **sizes, divergence="hutchinson", probes=2, control="double")
    sparse.save_pretrained(tmp_path / "sparse")
    assert type(sparse).from_pretrained(tmp_path / "sparse").flow.probes == 2
    assert sparse._flow_for(torch.zeros(3, 4)).probes == 2
    sparse.flow.divergence = "exact"  # as measurements do for a while
    assert sparse._flow_for(torch.zeros(3, 4)).divergence == "exact"
    sparse.save_pretrained(tmp_path / "exact")
    assert type(sparse).from_pretrained(tmp_path / "exact").flow.divergence == "exact"
