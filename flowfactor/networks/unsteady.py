"""Modules whose result is another at every call, or depends on the batch: what a solve cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd


def refuse_unsteady(
    part: nn.Module | Callable[..., Any], what: str = "", asked: str = "a solve asks its field"
) -> None:
    """Raises ValueError for a part that holds modules in training mode which draw at random or look at the whole batch.

    A solve evaluates its field and its costs many times, at places that depend on the results: noise that changes in between
    is no differential equation, and running statistics would move with the number of evaluations. Derivatives of a sample
    are no derivatives where the sample's value depends on others, or on a draw. Modules that a function holds in its closure
    are found too; what a forward draws by itself is not.

    Args:
        part: A potential, field or cost.
        what: What the message calls it, such as ``cost 'hj'``; its class where empty.
        asked: Who asks it.

    Raises:
        ValueError: With the name of the module.
    """
    for name, module in _modules(part):
        why = _why(module) if module.training else None
        if why is not None:
            raise ValueError(
                f"{type(module).__name__} ({name or 'the module itself'}) of {what or type(part).__name__} is in training "
                f"mode, where {why}, and {asked} many times: call .eval() on it, or draw the mask once yourself and hand it "
                "over as context"
            )


def _why(module: nn.Module) -> str | None:
    if isinstance(module, _BatchNorm):
        return "its result depends on the rest of the batch"
    if isinstance(module, _NormBase) and module.track_running_stats:
        return "its running statistics move at every call"
    probability = module.p if isinstance(module, _DropoutNd) else None
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        probability = module.dropout
    if isinstance(module, nn.RReLU) or probability:
        return "it draws at random at every call"
    return None


def _modules(part: Any) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(part, nn.Module):
        yield from _held("", part)
        return
    for name, module in part.named_modules():
        yield name, module
        for attribute in ("function", "force"):  # what parts of this package hold of users' functions
            function = vars(module).get(attribute)
            if function is not None:
                yield from _held(name, function)


def _held(name: str, function: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a function holds: whose method it is, and those in its closure."""
    held = [getattr(function, "__self__", None)]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # nothing is in it yet
            continue
    for inner in held:
        if isinstance(inner, nn.Module):
            yield from ((f"{name}: {below}" if below else name, one) for below, one in inner.named_modules())
