"""Where the processor's time of a step goes: ``python -m benchmarks.profile paper`` or ``forward``.

The operators of torch are timed one by one, by the clock of this thread's processor time, so that other programs hardly
disturb them. Timing adds some microseconds to each, so that the parts may come to more than the step. One thread; the
process keeps freed memory, as training programs do, or with ``--unprepared`` does not, and page faults are counted. The
machine's large product is read by torch, which takes MKL, and by oneDNN.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.potentials import paper_problem
from benchmarks.problem import Problem
from flowfactor.training import prepare_process

KINDS: dict[str, tuple[str, ...]] = {
    "products": ("bmm", "mm", "addmm", "baddbmm", "baddbmm_", "addmv", "mv", "dot", "_linear_pointwise"),
    "activations": ("tanh", "sigmoid_", "sigmoid", "gelu", "gelu_backward", "log1p_", "exp", "special_ndtr", "sin", "cos"),
    "copies and stacks": ("stack", "cat", "clone", "copy_", "_to_copy", "index", "index_select", "index_add", "fill_"),
    "sums": ("sum", "mean", "all", "aminmax"),
    "views and new tensors": (
        "view", "select", "slice", "unbind", "transpose", "unsqueeze", "squeeze", "expand", "alias", "detach", "permute",
        "_unsafe_view", "split", "split_with_sizes", "empty", "empty_like", "empty_strided", "new_empty", "new_ones",
        "new_zeros", "zeros_like", "ones_like", "as_strided", "t", "lift_fresh", "scalar_tensor",
    ),
}  # fmt: skip
ELEMENTWISE = "sums, products and the like of elements"
BETWEEN = "Python between operators, less what timing adds"


class Operators(TorchDispatchMode):
    """Adds up milliseconds of processor time and calls by operator, and by kind and the largest shape it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.shaped: defaultdict[str, float] = defaultdict(float)
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        begin = time.thread_time_ns()
        made = func(*args, **(kwargs or {}))
        spent = (time.thread_time_ns() - begin) / 1e6
        name = func.__name__.split(".")[0]
        kind = next((kind for kind, names in KINDS.items() if name in names), ELEMENTWISE)
        shapes = " by ".join(" x ".join(map(str, x.shape)) for x in args[:2] if isinstance(x, torch.Tensor))
        self.spent[kind] += spent
        self.calls[kind] += 1
        self.shaped[f"{name}: {shapes}"] += spent
        self.times[f"{name}: {shapes}"] += 1
        return made


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """Processor time of a call, the median."""
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        step()
        found.append((time.process_time() - begin) * 1e3)
    return statistics.median(found)


def rates(n: int = 2048) -> dict[str, float]:
    """Gflop/s of a large product, by torch and by oneDNN."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    found = {"torch": lambda: a @ b}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return {name: 2 * n**3 / 1e6 / milliseconds(multiply, 7) for name, multiply in found.items()}


def sides(name: str) -> tuple[Callable[[], object], float | None]:
    """The step of a name, and the Gflop that its mathematics needs, where they are counted."""
    if name == "paper":
        step, _, needed = paper_problem()
        return step, needed
    forward = Problem(32).ours()
    return lambda: forward(False), None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("step", choices=("paper", "forward"), help="the paper's flow step; the forward solve at D = 32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--shapes", type=int, default=12, help="lines of single operators")
    parser.add_argument("--unprepared", action="store_true", help="leave to the C library which memory it gives back")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if not args.unprepared:
        prepare_process()
    step, needed = sides(args.step)
    for _ in range(5):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    whole, operators = milliseconds(step, args.repeats), Operators()
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / args.repeats
    with operators:
        for _ in range(args.repeats):
            step()
    count = sum(operators.calls.values())
    own = {kind: spent / args.repeats for kind, spent in operators.spent.items()}
    print(f"a step: {whole:.2f} ms of processor time, {count / args.repeats:.0f} operators, {faults:.0f} page faults")
    print("\n| part | ms | share | calls |")
    print("|---|---|---|---|")
    for kind, spent in sorted(own.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {spent:.2f} | {spent / whole:.0%} | {operators.calls[kind] / args.repeats:.0f} |")
    rest = whole - sum(own.values())
    print(f"| {BETWEEN} | {rest:.2f} | {rest / whole:.0%} | |\n\n| operator | ms | calls |\n|---|---|---|")
    for what, spent in sorted(operators.shaped.items(), key=lambda item: -item[1])[: args.shapes]:
        print(f"| {what} | {spent / args.repeats:.2f} | {operators.times[what] / args.repeats:.0f} |")
    for name, rate in rates().items():
        share = "" if needed is None else f"; the step at {1e3 * needed / whole / rate:.0%} of it"
        print(f"\nlarge product by {name}: {rate:.0f} Gflop/s{share}", end="")
    print()


if __name__ == "__main__":
    sys.exit(main())
