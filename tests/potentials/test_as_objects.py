"""Potentials, fields and flows as Python objects: pickled, parametrized, pruned, cast, built from NumPy's numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import flowfactor as ff

D, K = 4, 3
P, F = ff.potentials, ff.fields
MAKERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: P.MLPPotential(D, K, (6, 5)),
    "convex": lambda: P.ConvexPotential(D, K, (6, 5)),
    "paper": lambda: P.PaperPotential(D, K),
    "resnet": lambda: P.ResNetPotential(D, K, width=6, depth=2),
    "quadratic": lambda: P.QuadraticPotential(D, K),
    "free": lambda: F.FreeField(D, K, (6, 5)),
    "solenoidal": lambda: F.SolenoidalField(D, K, 6),
    "helmholtz": lambda: F.HelmholtzField(P.MLPPotential(D, K, (6, 5)), F.SolenoidalField(D, K, 6)),
    "flow": lambda: ff.LatentFlow(P.MLPPotential(D, K, (6, 5))),
    "vae": lambda: ff.models.build_vae((1, 8, 8), K, D),
}


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("name", MAKERS)
def test_copies_are_equal(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    module = MAKERS[name]()
    twin = copied(module)
    for (key, a), (other, b) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        assert key == other and torch.equal(a, b) and a is not b
    if name != "vae":
        z = torch.randn(5, D)
        result = [m(z, [0.0, 1.0], 1).z if name == "flow" else m(z, 0.5, 1) for m in (module, twin)]
        torch.testing.assert_close(result[0], result[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "weight"), [("mlp", "w2"), ("convex", "raw_w2"), ("paper", "w2"), ("free", "w2"), ("solenoidal", "w")]
)
def test_parametrized_and_pruned_weights_act(name: str, weight: str) -> None:
    z = torch.randn(5, D)
    for change in (parametrizations.weight_norm, lambda m, n: prune.l1_unstructured(m, n, amount=0.5)):
        module = MAKERS[name]()
        before = module(z, 0.5, 1)
        change(module, weight)
        after = module(z, 0.5, 1)
        same = change is parametrizations.weight_norm  # which alone leaves the weight as it is
        assert torch.allclose(before, after, atol=1e-5) == same
        after.sum().backward()
        assert all(p.grad is not None for p in module.parameters() if p.shape[0] == K and p.ndim == 3)


def test_time_features_survive_half_precision() -> None:
    potential = P.MLPPotential(D, K)
    expected = potential.features.frequencies.clone()
    torch.testing.assert_close(potential.bfloat16().float().features.frequencies, expected, rtol=0, atol=0)


def test_numbers_of_numpy_and_lists_are_taken() -> None:
    assert P.MLPPotential(D, K, np.array([6, 5])).w2.shape == (K, 5, 6)
    matrix = [[1.0, 0.0], [0.0, 2.0]]
    torch.testing.assert_close(P.QuadraticPotential(2, S=matrix).S, torch.tensor([matrix]))
    force = ff.regularizers.NegativeSquare(D)
    z = torch.randn(5, D)
    torch.testing.assert_close(force(z, 0.5), force(z, torch.tensor(0.5)))


def test_a_numpy_control_is_named() -> None:
    flow = MAKERS["flow"]()
    with pytest.raises(TypeError, match=r"an integer tensor .* got ndarray"):
        flow(torch.randn(5, D), [0.0, 1.0], np.zeros(5, int))


def test_solvers_can_be_keys() -> None:
    assert len({ff.Solver("rk4"), ff.Solver("rk4"), ff.Solver("euler")}) == 2
    with pytest.raises(ValueError, match="rtol must be a finite number"):
        ff.Solver(rtol=True)


def test_errors_of_solves_travel_between_processes() -> None:
    error = ff.FlowSolveError("blew up", reason="nan", time=0.5, step=3, sample=(0,))
    twin = pickle.loads(pickle.dumps(error))
    assert str(twin) == "blew up" and (twin.reason, twin.time, twin.step, twin.sample) == ("nan", 0.5, 3, (0,))


@pytest.mark.parametrize("skew", ["learned", "canonical"])
@pytest.mark.parametrize("control", [1, torch.tensor([1, 0, 2, 2, 0])], ids=["int", "index"])
def test_a_stream_and_ridge_functions_together_learn(skew: str, control: int | torch.Tensor) -> None:
    made = P.MLPPotential(D, K, (6, 5)), P.MLPPotential(D, K, (6, 5)), F.SolenoidalField(D, K, 6)
    field = F.HelmholtzField(*made, skew=skew)
    path = ff.LatentFlow(field, ff.Solver("rk4"))(torch.randn(5, D), [0.0, 1.0], control)
    path.z[-1].square().sum().backward()
    assert all(p.grad is not None for p in field.parameters() if p.ndim > 1 and p.shape[0] == K)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
def test_transforms_that_cannot_follow_a_solve_are_named(transform: Callable) -> None:
    z, potential = torch.randn(2, D), P.MLPPotential(D, K)

    def last(solver: ff.Solver) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda z: ff.LatentFlow(potential, solver)(z, [0.0, 1.0], 1).z[-1].sum()

    transform(last(ff.Solver("rk4")))(z)
    with pytest.raises(ValueError, match="fixed ones"):
        transform(last(ff.Solver("dopri5")))(z)
