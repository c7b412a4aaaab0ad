"""Solves with a written-out way back against the same solves through autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flowfactor as ff
from flowfactor import latent_flow

D, K = 4, 3


def field(kind: str, activation: str) -> ff.fields.Field | ff.potentials.Potential:
    def make() -> ff.potentials.MLPPotential:
        return ff.potentials.MLPPotential(
            D, K, (6, 5), rank=2, time_features=4, init_scale=1.5, activation=activation
        ).double()

    if kind == "gradient":
        return make()
    return ff.fields.HelmholtzField(make(), make(), skew=kind).double()


@pytest.mark.parametrize("activation", ["logcosh", "softplus", "tanh"])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "euler", "bosh3"])
@pytest.mark.parametrize("kind", ["gradient", "learned", "canonical"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_same_steps_values_and_gradients(
    activation: str, method: str, kind: str, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = ff.LatentFlow(field(kind, activation), ff.Solver(method), divergence=divergence)  # type: ignore[arg-type]
    hj = ff.regularizers.HamiltonJacobi(ff.regularizers.NegativeSquare(D).double())
    costs = {"hj": hj, "action": ff.regularizers.TransportCost()}
    index = torch.tensor([1, 0, 2, 2, 0])  # groups of unequal size
    z0 = torch.randn(5, D).double().requires_grad_()
    inputs = [z0, *flow.parameters(), *hj.parameters()]

    def run(times: list[float]) -> tuple[ff.FlowPath, list[Tensor | None]]:
        t = torch.tensor(times).double()
        path = flow(z0, t, index, log_det=True, costs=costs, generator=torch.Generator().manual_seed(3))
        assert path.log_det is not None
        loss = path.z.sin().sum() + (path.z[1] ** 3).sum() + path.log_det[1].cos().sum() + path.log_det.sum()
        loss = loss + sum((c**2).sum() + c[1].sum() for c in path.costs.values())
        return path, list(torch.autograd.grad(loss, inputs, allow_unused=True))

    for times in ([0.0, 0.7, 1.5], [1.5, 0.7, 0.0]):
        monkeypatch.undo()
        path, found = run(times)
        monkeypatch.setattr(latent_flow, "_can_fuse", lambda *_: False)
        other, expected = run(times)
        assert (path.stats.nfe, path.stats.accepted) == (other.stats.nfe, other.stats.accepted)
        torch.testing.assert_close(path.z, other.z)
        torch.testing.assert_close(path.log_det, other.log_det)
        for a, b in zip(found, expected, strict=True):
            b = torch.zeros(()).double() if b is None else b
            scale = float(b.abs().max()) + 1e-6
            assert float((torch.zeros_like(b) if a is None else a).sub(b).abs().max()) <= 1e-8 * scale


def test_gradients_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = ff.LatentFlow(field("gradient", "logcosh"), ff.Solver("euler"))
    z = torch.randn(2, D).double().requires_grad_()

    def second() -> Tensor:
        (g,) = torch.autograd.grad(flow(z, [0.0, 1.0]).z[-1].sin().sum(), z, create_graph=True)
        return torch.autograd.grad(g.square().sum(), z)[0]

    found = second()
    monkeypatch.setattr(latent_flow, "_can_fuse", lambda *_: False)
    torch.testing.assert_close(found, second())
