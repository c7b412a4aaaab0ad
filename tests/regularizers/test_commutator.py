"""The Lie bracket of two flows: against known ones, against Jacobians, and against what flows do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from small_fields import small_fields
from torch import Tensor

import flowfactor as ff

R, P, F = ff.regularizers, ff.potentials, ff.fields
D, K = 4, 3


FIELDS = small_fields(D, (1.0, -2.0, 0.5), 2.0)


def matrices(*each: Tensor) -> P.QuadraticPotential:
    return P.QuadraticPotential(len(each[0]), len(each), S=torch.stack(each)).double()


def by_jacobians(field: Any, z: Tensor, t: Tensor, i: int, j: int, context: Tensor | None) -> Tensor:
    """J_j v_i - J_i v_j, by whole Jacobians of each sample, by reverse differentiation."""
    part = F.GradientField(field) if isinstance(field, P.Potential) else field
    rows = []
    for n in range(len(z)):
        here = None if context is None else context[n]

        def velocity(x: Tensor, k: int, n: int = n, here: Tensor | None = here) -> Tensor:
            return part(x, t[n], k, context=here)

        jacobian = {k: torch.func.jacrev(lambda x, k=k: velocity(x, k))(z[n]) for k in (i, j)}
        rows.append(jacobian[j] @ velocity(z[n], i) - jacobian[i] @ velocity(z[n], j))
    return torch.stack(rows)


def test_linear_flows_that_commute_have_none() -> None:
    turn, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))
    scales = torch.randn(K, D, dtype=torch.float64)
    u = matrices(*(turn @ s.diag() @ turn.mT for s in scales))
    z = torch.randn(7, D, dtype=torch.float64)
    assert float(R.Commutator()(u, z).detach().max()) < 1e-24
    assert float(torch.stack([u.derivatives(z, 0.0, k).gradient.detach().norm() for k in range(K)]).min()) > 0.1  # type: ignore[union-attr]


def test_linear_flows_that_do_not_have_that_of_their_matrices() -> None:
    """[S_i z, S_j z] = (S_j S_i - S_i S_j) z."""
    S = torch.randn(K, D, D, dtype=torch.float64)
    S = S + S.mT
    z = torch.randn(2, 5, D, dtype=torch.float64)
    squares = [(z @ (S[j] @ S[i] - S[i] @ S[j]).mT).square().sum(-1) for i, j in combinations(range(K), 2)]
    for pairs, which in ((None, [0, 1, 2]), ([(0, 2)], [1]), ([(2, 0), (1, 2)], [1, 2])):
        found = R.Commutator(pairs)(ff.LatentFlow(matrices(*S)), z, 0.3)
        torch.testing.assert_close(found, torch.stack([squares[p] for p in which]).mean(0))


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", FIELDS)
def test_values_and_gradients_are_those_of_jacobians(name: str, context: int) -> None:
    field = FIELDS[name](context).double()
    z, t = torch.randn(3, D, dtype=torch.float64, requires_grad=True), torch.tensor([0.1, 0.7, -0.4]).double()
    c = torch.randn(3, context, dtype=torch.float64, requires_grad=True) if context else None
    found = R.Commutator()(field, z, t, context=c)
    known = torch.stack(
        [by_jacobians(field, z, t, i, j, c).square().sum(-1) for i, j in combinations(range(K), 2)]
    ).mean(0)
    assert float(known.detach().min()) > 1e-6
    torch.testing.assert_close(found, known, rtol=1e-9, atol=1e-12)
    inputs = [z, *field.parameters()] + ([] if c is None else [c])
    pulled = [torch.autograd.grad(x.sum(), inputs, allow_unused=True) for x in (found, known)]
    assert sum(x is not None for x in pulled[1]) > len(inputs) / 2
    for ours, theirs, one in zip(*pulled, inputs, strict=True):
        zero = torch.zeros_like(one)
        torch.testing.assert_close(
            zero if ours is None else ours, zero if theirs is None else theirs, rtol=1e-7, atol=1e-10
        )


def test_it_is_what_two_orders_differ_by() -> None:
    r"""$\phi^j_s \phi^i_s z - \phi^i_s \phi^j_s z = s^2 [v_i, v_j] + O(s^3)$, of fields without time."""
    field = F.from_module([lambda z, t: z.sin().flip(-1), lambda z, t: (2 * z).cos(), lambda z, t: z * z], D)
    flow, z = ff.LatentFlow(field, ff.Solver(rtol=1e-11, atol=1e-11)), torch.randn(5, D, dtype=torch.float64)

    def after(z: Tensor, s: float, *order: int) -> Tensor:
        for k in order:
            z = flow(z, [0.0, s], k).z[-1]
        return z

    for pair in combinations(range(K), 2):
        s = 1e-3
        known = ((after(z, s, *pair) - after(z, s, *reversed(pair))) / s**2).square().sum(-1)
        torch.testing.assert_close(R.Commutator([pair])(field, z), known, rtol=3e-2, atol=3e-2)


def test_drawn_pairs_have_the_mean_of_all_as_their_expectation() -> None:
    field, z = FIELDS["free"](0), torch.randn(4, D)
    each = torch.stack([R.Commutator([pair])(field, z) for pair in combinations(range(K), 2)]).detach()
    generator, one = torch.Generator().manual_seed(0), R.Commutator(draw=1)
    drawn = torch.stack([one(field, z, generator=generator).detach() for _ in range(300)])
    nearest = (drawn[:, None] - each).abs().sum(-1).min(1)
    assert float(nearest.values.max()) < 1e-5  # each is that of a pair,
    assert nearest.indices.bincount(minlength=3).min() > 70  # and of any
    torch.testing.assert_close(R.Commutator(draw=3)(field, z), each.mean(0))
    two = R.Commutator(draw=2)(field, z, generator=generator).detach()
    assert float((two - torch.stack([each[[0, 1]], each[[0, 2]], each[[1, 2]]]).mean(1)).abs().sum(-1).min()) < 1e-5


def test_states_without_gradient_and_without_graph() -> None:
    field, z = FIELDS["helmholtz"](0), torch.randn(4, D)
    with torch.no_grad():
        found = R.Commutator()(field, z)
    assert not found.requires_grad
    torch.testing.assert_close(found, R.Commutator()(field, z).detach())
    assert R.Commutator()(field, z[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("made", "error", "match"),
    [
        (lambda: R.Commutator([]), ValueError, "at least one pair"),
        (lambda: R.Commutator([(0, 1), (1, 0)]), ValueError, "each once in either order"),
        (lambda: R.Commutator([(1, 1)]), ValueError, "two different flows"),
        (lambda: R.Commutator([(0, -1)]), ValueError, "counted from 0"),
        (lambda: R.Commutator([(0, 1.0)]), TypeError, "two flows"),  # type: ignore[list-item]
        (lambda: R.Commutator([3]), TypeError, "two flows"),  # type: ignore[list-item]
        (lambda: R.Commutator(draw=0), ValueError, "draw"),
        (lambda: R.Commutator()(F.FreeField(D), torch.zeros(1, D)), ValueError, "one alone"),
        (lambda: R.Commutator([(0, 3)])(F.FreeField(D, 3), torch.zeros(1, D)), ValueError, "flows 0 to 2"),
        (lambda: R.Commutator()(torch.nn.Linear(2, 2), torch.zeros(1, 2)), TypeError, "got Linear"),  # type: ignore[arg-type]
        (lambda: R.Commutator()(F.FreeField(D, 2), torch.zeros(1, 3)), ValueError, "must have shape"),
        (lambda: R.Commutator()(F.FreeField(D, 2, context=2), torch.zeros(1, D)), ValueError, "context"),
    ],
)
def test_what_cannot_be_compared_is_refused(made: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        made()


def test_modules_that_draw_at_random_are_refused() -> None:
    field = F.from_module([torch.nn.Dropout(0.5), torch.nn.Identity()], D)
    with pytest.raises(ValueError, match=r"Dropout .* its Lie brackets ask it"):
        R.Commutator()(field, torch.zeros(2, D))
