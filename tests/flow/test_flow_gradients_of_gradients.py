"""Gradients of gradients through closed forms, of every built-in part."""

from __future__ import annotations

import pytest
import torch
from constructors import FIELDS, POTENTIALS, D, K

import flowfactor as ff

PARTS = {**{f"potential {name}": make for name, make in POTENTIALS.items()}, **FIELDS}

GENERAL = ("user", "convex", "module", "resnet", "helmholtz-two", "quadratic")  # parts without closed form


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("name", PARTS)
def test_they_are_those_of_the_general_engine(name: str, divergence: str) -> None:
    torch.manual_seed(0)
    part, control, found = PARTS[name]().double(), torch.arange(2 * K) % K, []
    for engine in ("auto", "general"):
        flow = ff.LatentFlow(part, ff.Solver("rk4", step_size=0.5, engine=engine), divergence)  # type: ignore[arg-type]
        z = torch.randn(2 * K, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        path = flow(z, [0.0, 1.0], control, log_det=True, generator=torch.Generator().manual_seed(2))
        assert path.log_det is not None
        if engine == "auto" and not any(word in name for word in GENERAL):
            assert path.stats.engine == "closed form", path.stats.reason
        whole = path.z[-1].sin().sum() + path.log_det[-1].sum()
        (first,) = torch.autograd.grad(whole, z, create_graph=True)
        inputs = [z, *part.parameters()]
        found.append(torch.autograd.grad(first.square().sum(), inputs, allow_unused=True, materialize_grads=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
