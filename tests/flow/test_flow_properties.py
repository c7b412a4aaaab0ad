"""Properties of flows over drawn shapes, times and controls."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flowfactor as ff

D, K = 3, 3
SOLVER = ff.Solver("dopri5", rtol=1e-9, atol=1e-9)
CLOSE = {"rtol": 0, "atol": 1e-6}


def flow(kind: str = "helmholtz", divergence: str = "exact") -> ff.LatentFlow:
    def mlp() -> ff.potentials.MLPPotential:
        return ff.potentials.MLPPotential(D, K, (5, 4), rank=2, time_features=4, init_scale=1.0)

    torch.manual_seed(3)
    fields: dict[str, Any] = {
        "gradient": mlp(),
        "helmholtz": ff.fields.HelmholtzField(mlp(), mlp()),
        "free": ff.fields.FreeField(D, K, (5, 4), rank=2, time_features=4, init_scale=1.0),
    }
    return ff.LatentFlow(fields[kind].double(), SOLVER, divergence=divergence)


FLOWS = {kind: flow(kind) for kind in ("gradient", "helmholtz", "free")}
kinds = st.sampled_from(sorted(FLOWS))
batches = st.lists(st.integers(1, 3), max_size=3).map(tuple)
seeds = st.integers(0, 2**31 - 1)
gaps = st.lists(st.floats(0.05, 0.7, allow_subnormal=False), min_size=1, max_size=4)


@st.composite
def times(draw: st.DrawFn) -> Tensor:
    """Strictly monotone times, up or down, from any start."""
    steps = [draw(st.floats(-2, 2, allow_subnormal=False)), *draw(gaps)]
    t = torch.tensor(steps).double().cumsum(0)
    return t.flip(0) if draw(st.booleans()) else t


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Any]:
    """States of any batch, and a control of any kind that fits them."""
    batch = draw(batches)
    generator = torch.Generator().manual_seed(draw(seeds))
    z = torch.randn(*batch, D, generator=generator).double()

    def piece(kind: str) -> Any:
        if kind == "int":
            return draw(st.integers(0, K - 1))
        if kind == "index":
            return torch.randint(K, batch, generator=generator)
        return torch.randn(*batch, K, generator=generator).double()

    kind = draw(st.sampled_from(["int", "index", "weights", "schedule"]))
    if kind != "schedule":
        return z, piece(kind)
    starts = sorted(draw(st.sets(st.floats(-2, 3, allow_subnormal=False), min_size=1, max_size=2)))
    return z, ff.Schedule(
        [(s, piece(draw(st.sampled_from(["int", "index", "weights"])))) for s in (-math.inf, *starts)]
    )


def one_hot(control: Any, z: Tensor) -> Any:
    if isinstance(control, ff.Schedule):
        return ff.Schedule([(s, one_hot(c, z)) for s, c in zip(control.starts, control.controls, strict=True)])
    if isinstance(control, int):
        control = torch.full(z.shape[:-1], control)
    return control if control.is_floating_point() else torch.nn.functional.one_hot(control, K).to(z)


def take(control: Any, rows: Tensor, batch: int) -> Any:
    """The control of some rows of a flat batch."""
    if isinstance(control, ff.Schedule):
        return ff.Schedule([(s, take(c, rows, batch)) for s, c in zip(control.starts, control.controls, strict=True)])
    if isinstance(control, int):
        return control
    return control.reshape(batch, *([K] if control.is_floating_point() else []))[rows]


@given(kinds, problems(), times())
def test_a_solve_composes_of_its_intervals_and_log_det_adds_up(
    kind: str, problem: tuple[Tensor, Any], t: Tensor
) -> None:
    (z, control), costs = problem, {"action": ff.regularizers.TransportCost()}
    whole = FLOWS[kind](z, t, control, log_det=True, costs=costs)
    assert (
        whole.z.shape == (len(t), *z.shape) and whole.log_det.shape == whole.costs["action"].shape == whole.z.shape[:-1]
    )
    log_det = action = torch.zeros(z.shape[:-1]).double()
    for i, span in enumerate(zip(t[:-1], t[1:], strict=True)):
        part = FLOWS[kind](z, torch.stack(span), control, log_det=True, costs=costs)
        z, log_det, action = part.z[-1], log_det + part.log_det[-1], action + part.costs["action"][-1]
        torch.testing.assert_close(z, whole.z[i + 1], **CLOSE)
        torch.testing.assert_close(log_det, whole.log_det[i + 1], **CLOSE)
        torch.testing.assert_close(action, whole.costs["action"][i + 1], **CLOSE)


@given(kinds, problems(), times())
def test_the_inverse_undoes_a_flow_and_its_log_det(kind: str, problem: tuple[Tensor, Any], t: Tensor) -> None:
    z, control = problem
    there = FLOWS[kind](z, t, control, log_det=True)
    back = FLOWS[kind].inverse(there.z[-1], t, control, log_det=True)
    torch.testing.assert_close(back.t, t.flip(0))
    torch.testing.assert_close(back.z.flip(0), there.z, rtol=0, atol=1e-5)
    torch.testing.assert_close(back.log_det[-1], -there.log_det[-1], rtol=0, atol=1e-5)


@given(kinds, problems(), times())
def test_an_index_acts_as_its_one_hot_weights(kind: str, problem: tuple[Tensor, Any], t: Tensor) -> None:
    z, control = problem
    a, b = (FLOWS[kind](z, t, c, log_det=True) for c in (control, one_hot(control, z)))
    torch.testing.assert_close(a.z, b.z, **CLOSE)
    torch.testing.assert_close(a.log_det, b.log_det, **CLOSE)


@given(kinds, problems(), times(), seeds)
def test_a_permuted_flat_batch_is_permuted(kind: str, problem: tuple[Tensor, Any], t: Tensor, seed: int) -> None:
    z, control = problem
    count = z.shape[:-1].numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    whole = FLOWS[kind](z, t, control).z.reshape(len(t), count, D)
    moved = FLOWS[kind](z.reshape(count, D)[order], t, take(control, order, count)).z
    torch.testing.assert_close(moved, whole[:, order], **CLOSE)


@given(kinds, problems(), times())
def test_a_schedule_that_switches_to_itself_changes_nothing(kind: str, problem: tuple[Tensor, Any], t: Tensor) -> None:
    z, control = problem
    if isinstance(control, ff.Schedule):
        pieces = list(zip(control.starts, control.controls, strict=True))
        again = ff.Schedule([*pieces, (pieces[-1][0] + 0.3, pieces[-1][1])])
    else:
        again = ff.Schedule([(-math.inf, control), (float(t.mean()), control)])
    torch.testing.assert_close(FLOWS[kind](z, t, again).z, FLOWS[kind](z, t, control).z, **CLOSE)


@given(problems(), times(), st.sampled_from(["direct", "adjoint", "checkpoint"]))
def test_every_way_of_gradients_pulls_back_alike(problem: tuple[Tensor, Any], t: Tensor, gradient: str) -> None:
    z, control = problem
    found = []
    for mode in ("direct", gradient):
        latent = ff.LatentFlow(FLOWS["helmholtz"].field, ff.Solver("dopri5", rtol=1e-9, atol=1e-9, gradient=mode))
        start = z.clone().requires_grad_()
        path = latent(start, t, control, log_det=True)
        found.append(torch.autograd.grad(path.z.sin().sum() + path.log_det.sum(), start)[0])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@given(problems(), times())
def test_densities_follow_the_flow(problem: tuple[Tensor, Any], t: Tensor) -> None:
    """Pushed by a flow, ln q_t(z_t) = ln q_0(z_0) - log det, whatever the shapes, times and controls."""
    z, control = problem
    q0 = torch.distributions.Independent(torch.distributions.Normal(torch.zeros_like(z), 1.0), 1)
    path = FLOWS["helmholtz"](z, t[[0, -1]], control, log_det=True)
    pushed = FLOWS["helmholtz"].push(q0, t[-1], control, t0=t[0])
    expected = q0.log_prob(z) - path.log_det[-1]
    torch.testing.assert_close(pushed.log_prob(path.z[-1]), expected, rtol=0, atol=1e-5)
