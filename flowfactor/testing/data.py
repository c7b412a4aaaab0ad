"""The check of data sets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flowfactor.data import SequenceDataset
from flowfactor.testing.contract import Contract, ContractError

LOOKED_AT = 12  # elements


def check_dataset(d: SequenceDataset, *, without: Iterable[str] = ()) -> None:
    """Checks that a data set keeps what training relies on.

    Items and batches: shapes, float32 frames in [0, 1], times that increase, k in range, and own times, masks and contexts
    where there are such; items as batches, in any order, the same again; epochs: every element at most once, as many of each
    k, the same under equal generators, no draw from PyTorch's global generator; a loader that goes on where it was; subsets;
    fingerprints; copies; refusals.

    Args:
        d: The data set.
        without: Names of `PROMISES` that it is excused from.

    Raises:
        ContractError: If a promise is broken.
        TypeError: If ``d`` is no data set of sequences.
        ValueError: If ``without`` names no promise.

    Example:
        >>> import torch, flowfactor as ff
        >>> flows = {"turn": (ff.data.Rotate(), 0, 80), "grow": (ff.data.Scale(), 1, 1.8)}
        >>> ff.testing.check_dataset(ff.data.TransformedImages(torch.rand(6, 1, 8, 8), flows, steps=3))
    """
    if not isinstance(d, SequenceDataset):
        raise TypeError(f"check_dataset takes a flowfactor.data.SequenceDataset, got {type(d).__name__}")
    contract = Contract(d, without)
    with contract.silent():
        _check_batches(contract, d)
        _check_epochs(contract, d)
    size = len(d)
    for what, call in (
        ("an index that is not there", lambda: d.batch([size])),
        ("an index below 0 in a batch", lambda: d.batch([-1])),
        ("indices that are no integers", lambda: d.batch(torch.zeros(2))),
        ("k of another batch", lambda: d.batch([0], k=[0, 0])),
        ("a subset of nothing", lambda: d.subset([])),
    ):
        contract.refuses(what, call)
    try:
        found: object = d[size]
    except IndexError:
        return  # which ends a for-loop over the data set
    raise ContractError(contract.name, "d[len(d)] is refused", type(found).__name__, "IndexError")


def _check_batches(contract: Contract, d: SequenceDataset) -> None:
    contract.require("there are elements", len(d) > 0, len(d), "at least one")
    names_fit = d.num_flows == len(d.flow_names) and all(isinstance(name, str) for name in d.flow_names)
    contract.require("every flow has a name", names_fit, d.flow_names, "a tuple of names")
    steps = (d.t.diff() > 0).all() and d.t.shape == (d.num_steps + 1,)
    contract.require("times are [T+1] and increase", steps, d.t, "one time a frame")
    falls = d.runs == "backward"  # batches then begin with the last frame
    indices = torch.arange(len(d))[:: max(1, len(d) // LOOKED_AT)][:LOOKED_AT]
    batch = contract.attempt("a batch is made", lambda: d.batch(indices))
    frames, k = batch["frames"], batch["k"]
    shape = (len(indices), d.num_steps + 1, *d.image_shape)
    contract.tensor("frames", frames, shape, torch.zeros((), dtype=torch.float32, device=d.t.device))
    low, high = float(frames.min()), float(frames.max())
    contract.require("frames lie in [0, 1]", low >= 0 and high <= 1, f"values from {low:g} to {high:g}", "[0, 1]")
    contract.require("k is [B] int64", k.dtype == torch.int64 and k.shape == indices.shape, k, "one a sequence")
    in_range = bool(((k >= 0) & (k < d.num_flows)).all()) or (d.fixed_k is not None and bool((d.fixed_k == -1).all()))
    contract.require("k names a flow", in_range, k.tolist(), f"[0, {d.num_flows}), or fixed_k of -1 throughout")
    if batch["t"].ndim == 1:
        way = (batch["t"].flip(0) - batch["t"][-1]) if falls else batch["t"] - batch["t"][0]
        contract.close("t of a batch is that of the data set", way, d.t - d.t[0])
    else:
        _check_own_times(contract, batch["t"].flip(1) if falls else batch["t"], (len(indices), d.num_steps + 1))
    mask = batch.get("mask")
    if mask is not None:
        observed = mask.dtype == torch.bool and mask.shape == frames.shape[:2] and bool(mask[:, 0].all())
        contract.require("a mask says [B, T+1] what was observed, the first frame always", observed, mask, "booleans")
    contract.require(
        "context_size is that of a batch", _context_size(batch) == d.context_size, _context_size(batch), d.context_size
    )
    labels = d.fixed_k
    if labels is not None:
        contract.require("fixed_k has one k an element", labels.shape == (len(d),), list(labels.shape), [len(d)])
        contract.close("k of a batch is fixed_k", k.cpu().double(), labels[indices].double())
    order = torch.arange(len(indices) - 1, -1, -1)
    _equal(contract, "a batch in another order", d.batch(indices[order], k[order]), _rows(batch, order))
    for i in (0, len(indices) - 1):
        item = d[int(indices[i])]
        whole = isinstance(item["k"], int) and item["k"] == int(k[i])
        contract.require("an item's k is an int, as in its batch", whole, item["k"], int(k[i]))
        _equal(contract, "an item is as in its batch", _rest(item), _rest(_rows(batch, i)))
    contract.require("an empty batch", d.batch([])["frames"].shape == (0, *shape[1:]), "another shape", [0, *shape[1:]])
    part = d.subset(indices)
    contract.require("a subset has its length", len(part) == len(indices), len(part), len(indices))
    positions = torch.arange(len(indices))
    _equal(contract, "a subset holds its elements", part.batch(positions, k), batch)
    mark = d.fingerprint()
    for promise, other in contract.copies(d):
        _equal(contract, promise, other.batch(indices, k), batch)
        contract.require("copies have the fingerprint", other.fingerprint() == mark, other.fingerprint(), mark)


def _check_own_times(contract: Contract, t: Tensor, shape: tuple[int, int]) -> None:
    fits = t.shape == shape and bool(t.isfinite().all()) and bool((t.diff(dim=1) >= 0).all())
    contract.require("own times are [B, T+1] and do not decrease", fits, t, f"finite times {list(shape)}")


def _context_size(batch: dict[str, Any]) -> int | dict[str, int]:
    context = batch.get("context")
    if isinstance(context, dict):
        return {name: part.shape[1] for name, part in context.items()}
    return 0 if context is None else context.shape[1]


def _check_epochs(contract: Contract, d: SequenceDataset) -> None:
    flows = max(d.num_flows, 1)
    size = min(2 * flows, len(d))
    drawn: list[list[Any]] = []
    for seed in (0, 0, 1):
        plan = d.plan(size, generator=torch.Generator().manual_seed(seed))
        drawn.append([(indices.tolist(), k.tolist(), *draw) for indices, k, *draw in plan])
    contract.require("equal generators draw equal epochs", drawn[0] == drawn[1], drawn[1], drawn[0])
    seen = [i for indices, *_ in drawn[0] for i in indices]
    contract.require(
        "an epoch has an element at most once", len(seen) == len(set(seen)), sorted(seen), "no index twice"
    )
    if size == 2 * flows and (d.fixed_k is None or bool((d.fixed_k >= 0).all())):
        for _, k, *_ in drawn[0]:
            counts = [k.count(flow) for flow in range(flows)]
            contract.require(
                "a stratified batch has as many of each k", max(counts) - min(counts) <= 1, counts, "equal"
            )
    if not drawn[0]:
        return
    loader, again = (d.loader(size, generator=torch.Generator().manual_seed(s)) for s in (0, 5))
    batches = iter(loader)
    next(batches)
    again.load_state_dict(loader.state_dict())
    following = next(batches, None) or next(iter(loader))
    _equal(contract, "a loader goes on where it was", next(iter(again)), following)


def _rest(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "k"}


def _rows(batch: dict[str, Any], rows: Any) -> dict[str, Any]:
    def of(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {part: features[rows] for part, features in value.items()}
        return value if name == "t" and value.ndim == 1 else value[rows]

    return {name: of(name, value) for name, value in batch.items()}


def _equal(contract: Contract, promise: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    contract.require(promise, found.keys() == expected.keys(), sorted(found), sorted(expected))
    for name, value in expected.items():
        if isinstance(value, dict):
            _equal(contract, f"{promise} ({name})", found[name], value)
        elif isinstance(value, Tensor):
            contract.close(f"{promise} ({name})", found[name].double(), value.double(), 1e-6)
