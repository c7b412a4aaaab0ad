"""What all checks share: the error, comparisons, and the promises that every module makes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowfactor.control import Control, Schedule

PROMISES = {
    "deepcopy": "a copy by copy.deepcopy gives the same and shares no memory",
    "pickle": "what pickle gives back gives the same, as worker processes need it",
    "state_dict": "the state_dict holds all that the outputs depend on, and loads with weights_only=True",
    "registered": "tensors are parameters or buffers, so that they are moved, converted and saved",
    "double": "after .double() all works in double precision; the checks against finite differences need it",
    "gradients": "gradients of parameters are those of finite differences",
    "permutation": "no sample's result depends on its place in the batch",
    "flows": "the flows differ once their parameters do: the control is not ignored",
    "refusals": "bad arguments raise ValueError or TypeError",
}
"""Promises that a part may be excused from (``without=...``), and what each says."""

M = TypeVar("M", bound=nn.Module)
BATCHES: tuple[tuple[int, ...], ...] = ((), (5,), (2, 3), (0,))
STEP = 1e-5  # of central differences in double precision: their error is about 1e-10 of the derivatives' own size


class ContractError(AssertionError):
    """A part breaks a promise.

    Args:
        part: What was checked, for example ``"MLPPotential"``.
        promise: What it has to keep.
        found: What was found.
        expected: What was expected.

    Example:
        >>> raise ContractError("Well", "values have the shape of the batch", [5, 1], [5])
        Traceback (most recent call last):
        ...
        flowfactor.testing.contract.ContractError: Well: values have the shape of the batch: expected [5], found [5, 1]
    """

    def __init__(self, part: str, promise: str, found: object, expected: object) -> None:
        super().__init__(f"{part}: {promise}: expected {expected}, found {found}")
        self.part, self.promise, self.found, self.expected = part, promise, found, expected

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles with its parts, so that the error of a worker process arrives whole."""
        return type(self), (self.part, self.promise, self.found, self.expected)


class Contract:
    """The comparisons of one check of one part; draws come from a generator of its own.

    Args:
        part: The part.
        without: Names of `PROMISES` that it is excused from.

    Raises:
        ValueError: If a name is unknown.

    Example:
        >>> Contract(nn.Linear(1, 1), ["pickle"]).keeps("pickle")
        False
    """

    def __init__(self, part: object, without: Iterable[str] = ()) -> None:
        self.name = type(part).__name__
        self.without = frozenset([without] if isinstance(without, str) else without)
        if unknown := sorted(self.without - PROMISES.keys()):
            raise ValueError(f"without names {', '.join(unknown)}; a part can be excused from {', '.join(PROMISES)}")
        self.generator = torch.Generator("cpu").manual_seed(0)

    def keeps(self, promise: str) -> bool:
        """Whether the part has to keep a promise."""
        return promise not in self.without

    def require(self, promise: str, holds: object, found: object, expected: object) -> None:
        """Raises `ContractError` unless something holds."""
        if not holds:
            raise ContractError(self.name, promise, found, expected)

    def tensor(self, promise: str, found: object, shape: Sequence[int], like: Tensor) -> None:
        """Requires a tensor of a shape, of the dtype and on the device of another."""
        kind = f"a tensor {list(shape)} of {like.dtype} on {like.device}"
        got = f"{list(found.shape)} of {found.dtype} on {found.device}" if isinstance(found, Tensor) else repr(found)
        same = isinstance(found, Tensor) and (found.shape, found.dtype) == (torch.Size(shape), like.dtype)
        self.require(promise, same and isinstance(found, Tensor) and found.device == like.device, got, kind)
        assert isinstance(found, Tensor)
        self.require(f"{promise}, finite", found.isfinite().all(), "NaN or infinity", "finite numbers")

    def close(self, promise: str, found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
        """Requires two tensors to agree, up to a share of the greatest number; by default to the precision they have."""
        self.require(promise, found.shape == expected.shape, list(found.shape), list(expected.shape))
        found, expected = found.detach(), expected.detach().to(found)
        tolerance = 1e-10 if tolerance is None and found.dtype == torch.float64 else tolerance or 1e-4
        difference = (found - expected).abs()
        if difference.numel() and not bool((bound := tolerance * (1 + expected.abs().max())) >= difference.max()):
            worst = int(difference.nan_to_num(torch.inf).argmax())
            got, wanted = (f"{float(x.reshape(-1)[worst]):.8g}" for x in (found, expected))
            raise ContractError(self.name, promise, f"{got} at element {worst}", f"{wanted} within {float(bound):.2g}")

    def refuses(self, what: str, call: Callable[[], object]) -> None:
        """Requires a call to raise ValueError or TypeError."""
        if not self.keeps("refusals"):
            return
        try:
            found = call()
        except (ValueError, TypeError):
            return
        except Exception as error:
            found = error
        raise ContractError(self.name, f"{what} is refused", repr(found), "ValueError or TypeError")

    def attempt(self, promise: str, call: Callable[[], Any]) -> Any:
        """Calls; an error breaks the promise."""
        try:
            return call()
        except ContractError:
            raise
        except Exception as error:
            raise ContractError(self.name, promise, f"{type(error).__name__}: {error}", "no error") from error

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Requires that nothing is drawn from PyTorch's global generator, whose state stays as it was in any case."""
        seed = torch.get_rng_state()
        try:
            yield
            kept = torch.equal(seed, torch.get_rng_state())
            self.require("all draws are the generator's", kept, "draws from the global generator", "none")
        finally:
            torch.set_rng_state(seed)

    def copies(self, part: Any) -> Iterator[tuple[str, Any]]:
        """The copies that a part gives, and the promise that each has to keep."""
        makers: dict[str, Callable[[], Any]] = {
            "deepcopy": lambda: copy.deepcopy(part), "pickle": lambda: pickle.loads(pickle.dumps(part))
        }  # fmt: skip
        for name, make in makers.items():
            if self.keeps(name):
                yield PROMISES[name], self.attempt(PROMISES[name], make)

    def randn(self, *shape: int, like: Tensor) -> Tensor:
        """Draws normal numbers, of the dtype and on the device of another tensor."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu").to(like)

    def rand(self, *shape: int, like: Tensor) -> Tensor:
        """Draws numbers from [0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device="cpu").to(like)

    def controls(self, batch: tuple[int, ...], flows: int, like: Tensor) -> Iterator[tuple[str, Control]]:
        """One control of every kind, and what it is called."""
        index = torch.randint(flows, batch, generator=self.generator, device="cpu").to(like.device)
        weights = self.randn(*batch, flows, like=like)
        yield "an int", flows - 1
        yield "an index", index
        yield "weights", weights
        yield "weights for all", self.randn(flows, like=like)
        yield "a schedule", Schedule([(-1.0, 0), (0.25, index), (0.75, weights)])


def like_of(module: nn.Module) -> Tensor:
    """A tensor of the dtype and on the device of a module."""
    tensors = (x for x in (*module.parameters(), *module.buffers()) if x.is_floating_point())
    return next(tensors, torch.zeros(())).detach()


def quiet(call: Callable[[], Any]) -> Any:
    """Calls without gradients."""
    with torch.no_grad():
        return call()


def changed(module: M, contract: Contract, size: float = 0.1) -> M:
    """A copy whose floating-point parameters are moved at random, so that no two flows are equal."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point():
                parameter.add_(size * contract.randn(*parameter.shape, like=parameter))
    return other


def check_module(contract: Contract, module: M, outputs: Callable[[M], Sequence[Tensor]]) -> None:
    """What every module promises of outputs that take no draws: copies, state, and nothing that a call leaves behind."""

    def same(promise: str, other: Any, expected: Sequence[Tensor]) -> None:
        found = contract.attempt(promise, lambda: quiet(lambda: outputs(other)))
        for a, b in zip(found, expected, strict=True):
            contract.close(promise, a, b, 1e-6)

    state = {name: value.clone() for name, value in module.state_dict().items()}
    expected = contract.attempt("an evaluation succeeds", lambda: quiet(lambda: outputs(module)))
    with contract.silent():
        same("the same evaluation gives the same again", module, expected)
    for name, value in module.state_dict().items():
        kept = torch.equal(value, state[name])
        contract.require(f"an evaluation leaves {name} as it was", kept, "another value", "the same value")
    if contract.keeps("registered"):
        loose = sorted(_unregistered(module))
        contract.require(PROMISES["registered"], not loose, f"plain tensors {', '.join(loose)}", "register_buffer")
    mine = {value.data_ptr() for value in module.state_dict().values() if value.numel()}
    for promise, other in contract.copies(module):
        same(promise, other, expected)
        shared = [name for name, value in other.state_dict().items() if value.data_ptr() in mine]
        contract.require(promise, not shared, f"shared {', '.join(shared)}", "memory of its own")
    if contract.keeps("deepcopy") and contract.keeps("state_dict"):
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        fresh = changed(module, contract, 1.0)
        contract.attempt(PROMISES["state_dict"], lambda: fresh.load_state_dict(torch.load(file, weights_only=True)))
        same(PROMISES["state_dict"], fresh, expected)


def check_gradients(contract: Contract, module: M, outputs: Callable[[M], Sequence[Tensor]]) -> None:
    """Gradients of a random weighting of outputs in the parameters, against central differences, in double precision."""
    if not (contract.keeps("gradients") and contract.keeps("double")):
        return
    module = changed(module.double(), contract, 0.02).requires_grad_()
    moved = {name: contract.randn(*p.shape, like=p) for name, p in module.named_parameters() if p.is_floating_point()}
    weights = [contract.randn(*x.shape, like=x) for x in quiet(lambda: outputs(module))]

    def loss() -> Tensor:
        return torch.stack([(w * x).sum() for w, x in zip(weights, outputs(module), strict=True)]).sum()

    parameters = dict(module.named_parameters())
    if not moved:
        return
    total = contract.attempt(PROMISES["gradients"], loss)
    contract.require("outputs carry gradients", total.requires_grad, "none", "a graph to the parameters")
    found = torch.autograd.grad(total, [parameters[name] for name in moved], allow_unused=True)
    for (name, direction), gradient in zip(moved.items(), found, strict=True):
        slope = torch.zeros_like(total) if gradient is None else (gradient * direction).sum().detach()
        for difference in _differences(loss, total.detach(), parameters[name], direction):
            size = 1e-5 * (1 + float(difference.abs()) + 1e-3 * float(total.detach().abs()))
            if float((slope - difference).abs()) <= size:
                break
        else:
            contract.close(f"{PROMISES['gradients']} ({name})", slope, difference, size / (1 + float(difference.abs())))


@torch.no_grad()
def _differences(loss: Callable[[], Tensor], here: Tensor, parameter: Tensor, direction: Tensor) -> Iterator[Tensor]:
    """Differences of a loss along a direction of a parameter, which is left as it was.

    Central ones first. Where a kink, as of a ReLU, lies between their ends, the gradient is the slope on one side of it.
    """
    for step in (STEP, STEP / 16, STEP / 256):
        ends = []
        for signed in (step, -step):
            parameter.add_(direction, alpha=signed)
            ends.append(loss())
            parameter.sub_(direction, alpha=signed)
        yield from ((ends[0] - ends[1]) / (2 * step), (ends[0] - here) / step, (here - ends[1]) / step)


def _unregistered(module: nn.Module) -> Iterator[str]:
    """Names of tensors that submodules hold as plain attributes, in containers as well; a recorded argument is none."""
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers", "_modules", "_arguments", "training") or name.endswith("_hooks"):
                continue
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            if any(isinstance(x, Tensor) for x in values):
                yield f"{prefix}.{name}".lstrip(".")
