"""How well flows compose, and how far they carry: superposed, switched midway, and past the training times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowfactor._checks import check_optional_count
from flowfactor._evaluating import evaluating
from flowfactor.context import Context
from flowfactor.control import Control, Schedule
from flowfactor.data import SequenceDataset, weights_schedule
from flowfactor.data.starts import Direction, Start
from flowfactor.metrics._checks import check_order, running_as
from flowfactor.metrics.draw import draw_elements
from flowfactor.metrics.estimates import (
    CONFIDENCE,
    Estimate,
    MeanInterval,
    mean_bounds,
    normal_quantile,
    standard_error,
)
from flowfactor.models.checks import check_frames
from flowfactor.models.inputs import beside, refuse_missing, rows_of
from flowfactor.models.protocols import HasFlows, Transforms


@dataclass(frozen=True)
class ErrorCurve(MeanInterval):
    """Errors along time.

    Attributes:
        t: Times ``[T]``, in frames, without the first.
        mean: The error at each time, ``[T]``: summed over pixels and channels, mean over sequences.
        standard_error: Standard error of the mean over sequences, ``[T]``.
        doing_nothing: The same error of leaving the true x_0 as it is, ``[T]``.
        count: Number of sequences.
        beyond: Which times lie beyond those of training, ``[T]``.
    """

    t: Tensor
    mean: Tensor
    standard_error: Tensor
    doing_nothing: Tensor
    count: int
    beyond: Tensor

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        names = ("t", "mean", "standard_error", "low", "high", "doing_nothing", "beyond")
        figures = {name: getattr(self, name).tolist() for name in names}
        figures |= {name: [None if v != v else v for v in figures[name]] for name in ("standard_error", "low", "high")}
        return {**figures, "count": self.count}


@dataclass(frozen=True)
class CompositionError:
    """Errors of composed flows.

    Attributes:
        error: E, summed over frames 1..T, pixels and channels; mean over sequences.
        doing_nothing: The same error of leaving the true x_0 as it is.
        by_kind: E of the sequences of each kind that occurs: ``"single"`` (one flow all along), ``"superpose"`` (several
            at once, all along), ``"switch"`` (one at a time, not the same), ``"both"`` and ``"still"`` (none).
        doing_nothing_by_kind: Its counterpart.
        curve: The error along time.
        limit: The most sequences that were to be drawn; None where all were taken.
        seed: Seed of that draw.
    """

    error: Estimate
    doing_nothing: float
    by_kind: dict[str, Estimate]
    doing_nothing_by_kind: dict[str, float]
    curve: ErrorCurve
    limit: int | None = None
    seed: int = 0

    def __float__(self) -> float:
        return self.error.value

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            **self.error.as_dict(),
            "doing_nothing": self.doing_nothing,
            "by_kind": {kind: error.as_dict() for kind, error in self.by_kind.items()},
            "doing_nothing_by_kind": self.doing_nothing_by_kind,
            "curve": self.curve.as_dict(),
            "limit": self.limit,
            "seed": self.seed,
        }


@torch.no_grad()
def composition_error(
    model: Transforms,
    data: SequenceDataset | Iterable[Mapping[str, Any]],
    *,
    order: Tensor | None = None,
    control: Callable[[Mapping[str, Any]], Control] | None = None,
    start: Start | None = None,
    direction: Direction | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    confidence: float = CONFIDENCE,
) -> CompositionError:
    r"""The error of flows that act together or one after another, against the true frames.

    $$E = \frac1N \sum_x \sum_{t=1}^{T} \bigl| x_t - \mathrm{decode}(z_t) \bigr|_1, \qquad
      \frac{dz}{dt} = \sum_k w_k(t)\, v_k(z, t), \qquad z_0 = \mathrm{E}[z | x_0]$$

    the equivariance error (Song et al. 2023, section 4.1) under the weights of the data instead of one flow; the paper
    shows superposing and switching as pictures (its section 4.4). ``by_kind["single"]`` is the single-flow error on the
    same data, to compare the others with. The interval is the normal one of a mean over sequences.

    Args:
        model: A model with ``transform(x0, t, control)``.
        data: A data set whose batches hold ``"weights"``, such as `flowfactor.data.CombinedImages` (take the test
            split), or such batches themselves: ``"frames"`` [B, T+1, C, H, W], ``"t"`` [T+1] and ``"weights"``
            [B, T, K], of which ``weights[:, s]`` act between frames s and s + 1.
        order: The model's flow of each true transformation, ``[K]``, as `factor_accuracy` finds it; the same where None.
        control: Makes the control of a batch itself, for example ``lambda batch:
            model.schedule(model.infer_weights(batch["frames"]).mean, batch["t"])``; None makes it of the true weights.
        start: Where sequences begin: ``"first"`` or ``"any"``, for data that can begin anywhere (`TransformedImages` and its
            kin, `CombinedImages`); None as they do.
        direction: ``"forward"``, or ``"backward"``: the flow runs back from the encoded last frame, at times that fall; None
            as the data do, those that run both ways forward. Neither applies to batches.
        limit: Draw so many sequences of a data set at random; None for all. It does not apply to batches.
        seed: Seed of that draw.
        batch_size: Sequences per batch of a data set.
        confidence: Confidence of the intervals.

    Returns:
        The errors, in units of pixel values summed over a sequence.

    Raises:
        TypeError: If the data is neither of the two.
        ValueError: If a batch has no weights, a shape does not fit, the model has other flows than the data, or the data
            cannot begin or run so.

    Example:
        >>> import torch, flowfactor as ff
        >>> flows = {"turn": (ff.data.Rotate(), 0, 40), "grow": (ff.data.Scale(), 1, 1.5)}
        >>> data = ff.data.CombinedImages(torch.rand(6, 1, 8, 8), flows, steps=2)
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=2, latent_dim=4, hidden=(8, 8))
        >>> sorted(ff.metrics.composition_error(model, data).by_kind)
        ['single', 'superpose', 'switch']
    """
    normal_quantile(confidence)
    data = running_as(data, start, direction, "composition_error")  # type: ignore[arg-type]
    errors, resting, kinds = [], [], []
    t = torch.zeros(0)
    with evaluating(model):
        for batch in _batches(data, limit, batch_size, seed):
            frames, now, weights = _checked(batch, model, order)
            if len(t) and not torch.equal(t, now):
                raise ValueError(f"all batches must have the same times, got {t.tolist()} and {now.tolist()}")
            t = now
            acting = as_control(weights, t) if control is None else control(batch)
            made = model.transform(frames[:, 0], t, acting, **beside(batch, "context"))
            errors.append(_per_frame(frames, made))
            resting.append(_per_frame(frames, frames[:, :1]))
            kinds += _kinds(batch["weights"])
    if not errors:
        raise ValueError("there are no sequences to measure")
    error, rest = torch.cat(errors), torch.cat(resting)
    whole, still = error.sum(1), rest.sum(1)
    rows = {kind: torch.tensor([k == kind for k in kinds], device=whole.device) for kind in sorted(set(kinds))}
    curve = _curve(t, error, rest, torch.zeros(len(t) - 1, dtype=torch.bool, device=t.device))
    return CompositionError(
        _mean(whole, confidence),
        float(still.mean()),
        {kind: _mean(whole[mine], confidence) for kind, mine in rows.items()},
        {kind: float(still[mine].mean()) for kind, mine in rows.items()},
        curve,
        limit,
        seed,
    )


@torch.no_grad()
def extrapolation_error(
    model: Transforms,
    frames: Tensor | SequenceDataset,
    t: Any = None,
    k: Control = 0,
    *,
    context: Context | None = None,
    start: Start | None = None,
    direction: Direction | None = None,
    trained_until: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> ErrorCurve:
    r"""The equivariance error at each time, running on past the times of training.

    $$E(t) = \frac1N \sum_x \bigl| x_t - \mathrm{decode}(z_t) \bigr|_1, \qquad z_t = \phi^k_t(\mathrm{E}[z | x_0])$$

    the summand of the equivariance error (Song et al. 2023, section 4.1) at time t, against true frames. The intervals
    are normal ones of means over sequences.

    Args:
        model: A model with ``transform(x0, t, control)``.
        frames: True frames ``[N, T+1, C, H, W]``, over longer times than in training. Or a data set of such sequences, which
            `TransformedImages.longer` makes; its times and contexts are then its own, and k is an int.
        t: Their times ``[T+1]``, strictly monotone; backwards from 0 extrapolates to before the start.
        k: Which flow acts: an int, one index a sequence ``[N]``, weights ``[N, K]`` or a schedule.
        context: Features of each sequence ``[N, C]``, or such a tensor for each name, for a model that takes a context.
        start: Where sequences begin: ``"first"`` or ``"any"``, for data that can begin anywhere (`TransformedImages` and its
            kin, `CombinedImages`); None as they do.
        direction: ``"forward"``, or ``"backward"``: the flow runs back from the encoded last frame, at times that fall; None
            as the data do, those that run both ways forward. Both are for data sets alone.
        trained_until: The last time that training saw, to tell the times `beyond`; where None ``t[0]``, and for a
            data set that was made `longer` the last time of the shorter one.
        limit: Draw so many sequences of a data set at random; None for all.
        seed: Seed of that draw.
        batch_size: Sequences per batch.

    Returns:
        The curve, in units of pixel values summed over a frame.

    Raises:
        TypeError: If frames are no floats.
        ValueError: If a shape does not fit, or the data cannot begin or run so.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8))
        >>> curve = ff.metrics.extrapolation_error(model, torch.rand(3, 5, 1, 8, 8), range(5), trained_until=2)
        >>> curve.t.tolist(), curve.beyond.tolist()
        ([1.0, 2.0, 3.0, 4.0], [False, False, True, True])
        >>> data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
        >>> turn = ff.metrics.extrapolation_error(model, data.longer(6), start="any", direction="backward")
        >>> turn.t.tolist(), turn.beyond.tolist()
        ([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], [False, False, True, True, True, True])
    """
    data: Any = running_as(frames, start, direction, "extrapolation_error")  # type: ignore[arg-type]
    if isinstance(data, SequenceDataset):
        frames, t, context = _of_data(data, t, k, context, limit, seed)
        within = getattr(data, "within", 0)
        trained_until = float(t[within]) if trained_until is None and within else trained_until
    frames, t = check_frames(frames, list(t) if isinstance(t, range) else t, None)
    if len(t) < 2 or not len(frames):
        raise ValueError(f"frames must hold at least one sequence of two frames, got {list(frames.shape)}")
    whole = not isinstance(k, Tensor) or k.ndim == 0 or (k.is_floating_point() and k.ndim == 1)
    if isinstance(k, Tensor) and not whole and len(k) != len(frames):
        raise ValueError(f"k must have one entry a sequence, {len(frames)}, got shape {list(k.shape)}")
    if isinstance(k, Schedule):
        batch_size = len(frames)  # its pieces may hold an entry a sequence
    errors = []
    with evaluating(model):
        for rows in torch.arange(len(frames), device=frames.device).split(batch_size):
            acting = k if whole or not isinstance(k, Tensor) else k[rows.to(k.device)]
            also = {} if context is None else {"context": rows_of(context, rows)}
            errors.append(_per_frame(frames[rows], model.transform(frames[rows, 0], t, acting, **also)))
    until = 0.0 if trained_until is None else abs(float(trained_until) - float(t[0]))
    return _curve(t, torch.cat(errors), _per_frame(frames, frames[:, :1]), (t[1:] - t[0]).abs() > until)


def _of_data(
    data: SequenceDataset, t: Any, k: Control, context: Context | None, limit: int | None, seed: int
) -> tuple[Tensor, Tensor, Context | None]:
    """The frames, times and context of the sequences of one flow."""
    if t is not None or context is not None or not isinstance(k, int):
        raise ValueError("a data set has times and contexts of its own, and k is an int: leave t and context out")
    fixed = data.fixed_k
    own = torch.arange(len(data)) if fixed is None else (fixed == k).nonzero().flatten()
    if not len(own):
        raise ValueError(f"the data set has no sequence of flow {k}")
    batch = data.batch(own[draw_elements(len(own), limit, seed)], None if fixed is not None else k)
    refuse_missing(batch, "extrapolation_error")
    return batch["frames"], batch["t"], batch.get("context")


def as_control(weights: Tensor, t: Tensor) -> Control:
    """The control of weights ``[B, T, K]``: weights ``[B, K]`` where they hold all along, else a schedule.

    Args:
        weights: Weights, of which ``weights[:, s]`` act between frames s and s + 1.
        t: Times of the frames ``[T+1]``, strictly monotone.

    Returns:
        The control.

    Example:
        >>> as_control(torch.ones(2, 3, 1), torch.arange(4)).shape
        torch.Size([2, 1])
    """
    schedule = weights_schedule(weights, t)
    return schedule.controls[0] if len(schedule.controls) == 1 else schedule


def _batches(data: Any, limit: int | None, batch_size: int, seed: int) -> Iterator[Mapping[str, Any]]:
    check_optional_count("limit", limit)
    if isinstance(data, SequenceDataset):
        for rows in draw_elements(len(data), limit, seed).split(batch_size):
            yield data.batch(rows)
        return
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise TypeError(f"data must be a data set of sequences or an iterable of batches, got {type(data).__name__}")
    yield from data


def _checked(batch: Mapping[str, Any], model: HasFlows, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Checks a batch; returns frames, times, and the weights of the model's own flows."""
    missing = [name for name in ("frames", "t", "weights") if name not in batch]
    if missing:
        raise ValueError(
            f"a batch needs frames, t and weights; {', '.join(missing)} is missing. Data of one transformation a "
            "sequence is measured by equivariance_error"
        )
    refuse_missing(batch, "composition_error")
    frames, t = check_frames(batch["frames"], batch["t"], None)
    weights = batch["weights"]
    expected = (len(frames), len(t) - 1)
    if not isinstance(weights, Tensor) or weights.ndim != 3 or tuple(weights.shape[:2]) != expected:
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"weights must have shape [B, T, K] = [{expected[0]}, {expected[1]}, K], got {got}")
    if not expected[1]:
        raise ValueError("a sequence needs at least two frames, got 1")
    if not bool((t.diff() * (t[-1] - t[0]) > 0).all()):
        raise ValueError(f"t must increase or decrease strictly, got {t.tolist()}")
    flows = weights.shape[2]
    if model.num_flows != flows:
        raise ValueError(f"the model has {model.num_flows} flows and the weights are of {flows} transformations")
    weights = weights.to(frames)
    if order is None:
        return frames, t, weights
    order = check_order(order, flows).to(weights.device)
    return frames, t, torch.zeros_like(weights).index_copy(2, order, weights)


def _kinds(weights: Tensor) -> list[str]:
    """What happens in each sequence of weights [B, T, K]."""
    active = weights != 0
    several = (active.sum(2) > 1).any(1).tolist()
    changing = (active != active[:, :1]).flatten(1).any(1).tolist()
    moving = active.flatten(1).any(1).tolist()
    names = {(False, False): "single", (True, False): "superpose", (False, True): "switch", (True, True): "both"}
    return [names[s, c] if m else "still" for s, c, m in zip(several, changing, moving, strict=True)]


def _per_frame(frames: Tensor, made: Tensor) -> Tensor:
    """L1 errors [B, T] of the frames after the first."""
    return (frames[:, 1:] - (made[:, 1:] if made.shape[1] > 1 else made)).abs().flatten(2).sum(2)


def _curve(t: Tensor, error: Tensor, rest: Tensor, beyond: Tensor) -> ErrorCurve:
    return ErrorCurve(t[1:], error.mean(0), standard_error(error, 0), rest.mean(0), len(error), beyond)


def _mean(samples: Tensor, confidence: float) -> Estimate:
    mean, error = samples.mean(), standard_error(samples)
    low, high = mean_bounds(mean, error, confidence)
    return Estimate(float(mean), float(low), float(high), len(samples), confidence)
