"""Checks of potentials and of velocity fields."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowfactor.control import Control, Schedule
from flowfactor.fields import Field
from flowfactor.potentials import Potential
from flowfactor.testing.contract import BATCHES, STEP, Contract, changed, check_gradients, check_module, like_of, quiet

Evaluate = Callable[[Any, Tensor, Any, Control], Sequence[Tensor]]


def check_potential(u: Potential, *, without: Iterable[str] = ()) -> None:
    r"""Checks that a potential keeps what flows rely on.

    Shapes, dtype and device under any leading batch dimensions and every kind of control, in the precision the potential
    has and in double; an index against one-hot weights, weights against their sum $\sum_k c_k u_k$, schedules against
    their pieces; $\nabla u$, $\partial u/\partial t$, $\nabla^2 u$ and Hutchinson's estimate against central differences of
    $u$ and of $\nabla u$; gradients of parameters against central differences; copies, ``state_dict``; refusals.

    Args:
        u: The potential, in any precision, on any device.
        without: Names of `PROMISES` that it is excused from, for example ``["pickle"]``.

    Raises:
        ContractError: If a promise is broken.
        TypeError: If ``u`` is no potential.
        ValueError: If ``without`` names no promise.

    Example:
        >>> import flowfactor as ff
        >>> ff.testing.check_potential(ff.potentials.MLPPotential(dim=3, num_flows=2))
        >>> class Wrong(ff.potentials.Potential):
        ...     def flow_potential(self, z, t, k):
        ...         return z.square().sum(-1, keepdim=True)
        >>> ff.testing.check_potential(Wrong(dim=3), without=["pickle"])
        Traceback (most recent call last):
        ...
        flowfactor.testing.contract.ContractError: Wrong: an int and batch [], in torch.float32: expected no error, found ...
    """
    if not isinstance(u, Potential):
        raise TypeError(f"check_potential takes a flowfactor.potentials.Potential, got {type(u).__name__}")
    contract = Contract(u, without)

    def evaluate(u: Potential, z: Tensor, t: Any, control: Control) -> Sequence[Tensor]:
        d = u.derivatives(z, t, control, laplacian="exact")
        return [u(z, t, control), d.value, d.gradient, d.time, d.laplacian]  # pyright: ignore[reportReturnType]

    names = ["the value", "the value of derivatives()", "the gradient", "the time derivative", "the Laplacian"]
    _check_evaluations(contract, u, evaluate, names, vectors=(2,))
    z = contract.randn(4, u.dim, like=like_of(u))
    for what, call in (
        ("an unknown laplacian", lambda: u.derivatives(z, 0.0, laplacian="trace")),  # pyright: ignore[reportArgumentType]
        ("a probe of another shape", lambda: u.derivatives(z, 0.0, laplacian="hutchinson", probe=z[:2])),
    ):
        contract.refuses(what, call)
    if contract.keeps("double"):
        _check_derivatives(contract, changed(copy.deepcopy(u).double(), contract))


def _check_derivatives(contract: Contract, u: Potential) -> None:
    """Derivatives of a potential in double precision against central differences, under every kind of control."""
    like = like_of(u).double()
    z, t = contract.randn(4, u.dim, like=like), contract.rand(4, like=like)
    probes = _probes(u.dim, like)
    for name, control in contract.controls((4,), u.num_flows, like):
        t_now = torch.full_like(t, 0.5) if isinstance(control, Schedule) else t  # off the switching times

        def value(z: Tensor, t: Tensor, control: Control = control) -> Tensor:
            return quiet(lambda: u(z, t, control))

        def gradient(z: Tensor, control: Control = control, t: Tensor = t_now) -> Tensor:
            return quiet(lambda: u.derivatives(z, t, control).gradient)

        d = u.derivatives(z, t_now, control, laplacian="exact")
        assert d.value is not None and d.gradient is not None and d.time is not None and d.laplacian is not None
        contract.close(f"value and derivatives() agree ({name})", d.value, value(z, t_now))
        slope = torch.stack([_central(lambda x, t=t_now: value(x, t), z, e) for e in torch.eye(u.dim).to(like)], -1)
        contract.close(f"the gradient is that of the value ({name})", d.gradient, slope, 1e-6)
        speed = (value(z, t_now + STEP) - value(z, t_now - STEP)) / (2 * STEP)
        contract.close(f"the time derivative is that of the value ({name})", d.time, speed, 1e-6)
        bend = sum(_central(lambda x, e=e: gradient(x) @ e, z, e) for e in torch.eye(u.dim).to(like))
        assert isinstance(bend, Tensor)
        contract.close(f"the Laplacian is the divergence of the gradient ({name})", d.laplacian, bend, 1e-6)
        each = [u.derivatives(z, t_now, control, "hutchinson", probe=p.expand_as(z)).laplacian for p in probes]
        mean = torch.stack([x for x in each if x is not None]).mean(0)
        contract.close(f"Hutchinson's estimate has the Laplacian as its mean ({name})", mean, bend, 1e-6)
        several = torch.stack([p.expand_as(z) for p in probes])
        at_once = u.derivatives(z, t_now, control, "hutchinson", probe=several).laplacian
        assert at_once is not None
        contract.close(f"several probes give the mean of their estimates ({name})", at_once, mean)
    drawn = [u.derivatives(z, t, 0, "hutchinson", generator=torch.Generator(z.device).manual_seed(1)) for _ in range(2)]
    first, second = (d.laplacian for d in drawn)
    assert first is not None and second is not None
    contract.close("equal generators draw equal probes", first, second)


def check_field(f: Field, *, without: Iterable[str] = ()) -> None:
    r"""Checks that a velocity field keeps what flows rely on.

    As `check_potential`, with the divergence against the trace of the Jacobian by central differences, and Hutchinson's
    estimate against it in the mean over probes whose outer products have the identity as their mean.

    Args:
        f: The field, in any precision, on any device.
        without: Names of `PROMISES` that it is excused from.

    Raises:
        ContractError: If a promise is broken.
        TypeError: If ``f`` is no field.
        ValueError: If ``without`` names no promise.

    Example:
        >>> import flowfactor as ff
        >>> ff.testing.check_field(ff.fields.SolenoidalField(dim=3, num_flows=2, hidden=4))
    """
    if not isinstance(f, Field):
        raise TypeError(f"check_field takes a flowfactor.fields.Field, got {type(f).__name__}")
    contract = Contract(f, without)

    def evaluate(f: Field, z: Tensor, t: Any, control: Control) -> Sequence[Tensor]:
        return [f(z, t, control), f.divergence(z, t, control)]

    _check_evaluations(contract, f, evaluate, ["the velocity", "the divergence"], vectors=(0,))
    z = contract.randn(4, f.dim, like=like_of(f))
    contract.refuses("an unknown kind of divergence", lambda: f.divergence(z, 0.0, 0, "trace"))  # pyright: ignore[reportArgumentType]
    contract.refuses("Hutchinson's estimate without a probe", lambda: f.divergence(z, 0.0, 0, "hutchinson"))
    if not contract.keeps("double"):
        return
    f = changed(copy.deepcopy(f).double(), contract)
    z, t = z.double(), contract.rand(4, like=z.double())
    for name, control in contract.controls((4,), f.num_flows, z):
        trace = sum(
            _central(lambda x, e=e, c=control: quiet(lambda: f(x, t, c)) @ e, z, e) for e in torch.eye(f.dim).to(z)
        )
        assert isinstance(trace, Tensor)
        promise = f"the divergence is the trace of the Jacobian ({name})"
        contract.close(promise, f.divergence(z, t, control), trace, 1e-6)
        each = [f.divergence(z, t, control, "hutchinson", p.expand_as(z)) for p in _probes(f.dim, z)]
        mean = torch.stack(each).mean(0)
        contract.close(f"Hutchinson's estimate has the divergence as its mean ({name})", mean, trace, 1e-6)
        several = torch.stack([p.expand_as(z) for p in _probes(f.dim, z)])
        at_once = f.divergence(z, t, control, "hutchinson", several)
        contract.close(f"several probes give the mean of their estimates ({name})", at_once, mean)


def _check_evaluations(
    contract: Contract, part: Any, evaluate: Evaluate, names: Sequence[str], vectors: Sequence[int]
) -> None:
    """What potentials and fields both promise: shapes, controls, batches, gradients of parameters, copies, refusals."""
    like, flows, dim = like_of(part), part.num_flows, part.dim
    double = copy.deepcopy(part).double() if contract.keeps("double") else part
    for module in (part, double):
        like = like_of(module) if module is part else like.double()
        for batch in BATCHES:
            z = contract.randn(*batch, dim, like=like)
            for kind, control in contract.controls(batch, flows, like):
                for t in (0.5, contract.rand(*batch, like=like)):
                    promise = f"{kind} and batch {list(batch)}, in {like.dtype}"
                    found = contract.attempt(promise, lambda t=t, c=control, z=z, m=module: evaluate(m, z, t, c))
                    for i, (name, x) in enumerate(zip(names, found, strict=True)):
                        contract.tensor(f"{name} ({promise})", x, z.shape if i in vectors else batch, z)
    part, like = changed(double, contract), like.double() if contract.keeps("double") else like

    def compare(promise: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for name, a, b in zip(names, found, expected, strict=True):
            contract.close(f"{name}: {promise}", a, b, None if a.dtype == torch.float64 else 1e-3)

    z, t = contract.randn(2, 3, dim, like=like), contract.rand(2, 3, like=like)
    index = torch.tensor([[flows - 1, 0, 0], [0, flows - 1, flows // 2]], device=z.device)
    whole = evaluate(part, z, t, index)
    flat = evaluate(part, z.reshape(6, dim), t.reshape(6), index.reshape(6))
    reshaped = [x.reshape(y.shape) for x, y in zip(whole, flat, strict=True)]
    compare("leading dimensions are as good as a flat batch", reshaped, flat)
    one_hot = torch.nn.functional.one_hot(index, flows).to(z)
    compare("an index acts as its one-hot weights", evaluate(part, z, t, one_hot), whole)
    alone = [evaluate(part, z[i, j], t[i, j], int(index[i, j])) for i in range(2) for j in range(3)]
    compare("each sample as by itself", flat, [torch.stack(x) for x in zip(*alone, strict=True)])
    each = [evaluate(part, z, t, k) for k in range(flows)]
    weights = contract.randn(2, 3, flows, like=like)
    total = [
        sum(
            (weights[..., k].reshape(2, 3, *[1] * (x[0].ndim - 2)) * x[k] for k in range(flows)), torch.zeros_like(x[0])
        )
        for x in zip(*each, strict=True)
    ]
    compare("weights superpose the flows", evaluate(part, z, t, weights), total)
    schedule = Schedule([(-5.0, 0), (0.4, index), (0.6, flows - 1)])
    acting = torch.where(t < 0.4, 0, torch.where(t < 0.6, index, flows - 1))
    compare("a schedule acts as its pieces", evaluate(part, z, t, schedule), evaluate(part, z, t, acting))
    compare("no_grad changes nothing", quiet(lambda: evaluate(part, z, t, index)), whole)
    if contract.keeps("permutation"):
        order = torch.tensor([4, 2, 0, 5, 1, 3], device=z.device)
        moved = evaluate(part, z.reshape(6, dim)[order], t.reshape(6)[order], index.reshape(6)[order])
        compare("a permuted batch is permuted", moved, [x[order] for x in flat])
    if flows > 1 and contract.keeps("flows") and any(True for _ in part.parameters()):
        same = all(torch.equal(a, b) for a, b in zip(each[0], each[-1], strict=True))
        contract.require("the control says which flow acts", not same, f"flow {flows - 1} equal to flow 0", "another")
    check_module(contract, part, lambda m: evaluate(m, z, t, index))
    check_gradients(contract, part, lambda m: [x for k in (index, weights) for x in evaluate(m, z, t, k)])
    for what, call in (
        ("a list in place of a state", lambda: part([[0.0] * dim], 0.0)),
        ("a state of another size", lambda: part(contract.randn(3, dim + 1, like=like), 0.0)),
        ("a state of whole numbers", lambda: part(torch.zeros(3, dim, dtype=torch.long, device=z.device), 0.0)),
        ("times of another batch", lambda: part(z, t[0, :2])),
        ("a flow that is not there", lambda: part(z, 0.0, flows)),
        ("weights of other flows", lambda: part(z, 0.0, contract.rand(2, 3, flows + 1, like=like))),
        ("a control of another batch", lambda: part(z, 0.0, index[:, :2])),
    ):
        contract.refuses(what, call)


def _central(function: Callable[[Tensor], Tensor], z: Tensor, direction: Tensor) -> Tensor:
    return (function(z + STEP * direction) - function(z - STEP * direction)) / (2 * STEP)


def _probes(dim: int, like: Tensor) -> Tensor:
    """Rows of a Hadamard matrix, cut to D columns: signs whose outer products have the identity as their mean."""
    rows = torch.ones(1, 1)
    while len(rows) < dim:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows[:, :dim].to(like)
