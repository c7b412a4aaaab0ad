"""Times and weights that ask for their gradient keep it, or are refused by name: nowhere is it lost in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flowfactor as ff
from flowfactor.models._sparse_parts import sparse_schedule
from tests.models.baseline_cases import make


def learned(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("as_list", [False, True], ids=["a tensor", "a list"])
@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
def test_a_sparse_schedule_keeps_the_gradients_of_its_times(as_list: bool, back: bool) -> None:
    u = ff.potentials.QuadraticPotential(2, 2, S=torch.stack([torch.eye(2), -2 * torch.eye(2)]))
    flow = ff.LatentFlow(u.double(), ff.Solver(rtol=1e-9, atol=1e-9))
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double().unsqueeze(-1)
    times = learned(0.0, 0.4, 1.0)
    t, w = (times.flip(0), weights.flip(0)) if back else (times, weights)
    end = flow(torch.ones(1, 2).double(), [0.0, 1.0], sparse_schedule(w, list(t) if as_list else t)).z[-1]
    (found,) = torch.autograd.grad(end[0, 0], times)
    # z_1 = exp(s - 2 (1 - s)) for the switch at s; the first and last weights act beyond their ends.
    torch.testing.assert_close(found, torch.stack([x * end[0, 0].detach() for x in (0, 3, 0)]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("what", ["times", "switching times"])
def test_the_papers_steps_refuse_times_that_are_learned(what: str) -> None:
    model = make("paper-code").eval()
    times, switch = torch.tensor([0.0, 2.0]), torch.tensor(1.0, requires_grad=True)
    given: Any = (times.requires_grad_(), 0) if what == "times" else (times, ff.Schedule([(0.0, 0), (switch, 1)]))
    with pytest.raises(ValueError, match="no gradient"):
        model.path(torch.zeros(1, 4), *given)
    assert model.path(torch.zeros(1, 4), times.detach(), 0).shape == (2, 1, 4)


@pytest.mark.parametrize("name", ["t0", "t_max"])
def test_the_ends_of_until_are_refused_where_they_are_learned(name: str) -> None:
    flow = ff.LatentFlow(ff.potentials.QuadraticPotential(1, S=torch.eye(1)))
    ends: dict[str, Any] = {"t0": 0.0, "t_max": 2.0}
    with pytest.raises(ValueError, match=f"{name} has no gradient in until"):
        flow.until(
            torch.ones(1, 1), lambda z, t: z[..., 0] - 2, **ends | {name: torch.tensor(ends[name]).requires_grad_()}
        )


def test_settings_that_are_tensors_are_not_learned_in_silence() -> None:
    u = ff.potentials.MLPPotential(2)
    with pytest.raises(ValueError, match="skew"):
        ff.fields.SkewGradientField(u, torch.ones(2, 2).requires_grad_())
    prior: Any = torch.full((2,), 0.5).requires_grad_()
    with pytest.raises(ValueError, match="factor_prior"):
        ff.models.build_vae((1, 8, 8), num_flows=2, latent_dim=4, supervision="weak", num_frames=3, factor_prior=prior)
