"""Controls: what says which flows act on which sample, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from flowfactor._functorch import is_plain
from flowfactor._tensors import check_dense, check_range, spread
from flowfactor._tensors import times as times  # its place for all who know controls
from flowfactor.context import Context

PieceControl: TypeAlias = "int | Tensor"
Control: TypeAlias = "int | Tensor | Schedule"


class Schedule:
    r"""A control that changes over time.

    Piece ``i`` acts from its own starting time up to the next one's. A solve lands exactly on every switching time, in
    both directions of time, so that no step straddles a discontinuity.

    A switching time may be learned: a tensor that asks for its gradient keeps it in a solve, in the gradient modes
    ``direct`` and ``adjoint``. With $v_a$ before and $v_b$ after a switch at s, $\partial z_T/\partial s =
    \Phi_{T,s}\,(v_a - v_b)(z_s, s)$, where $\Phi_{T,s} = \partial z_T/\partial z_s$; the log-determinant and the costs
    gain the difference of their rates likewise. The tensor is read anew at every use, so that an optimizer may move it. A
    switching time outside of a solve's span has a gradient of zero.

    Args:
        pieces: Pairs ``(t_from, control)`` with strictly increasing times, in frames. ``-math.inf`` is allowed for the
            first. Each control is an int, a LongTensor ``[*batch]`` or weights ``[*batch, K]``.

    Attributes:
        moments: The starting times of the pieces: tensors where they ask for their gradient, else floats.
        controls: Their controls.

    Raises:
        ValueError: If there are no pieces, or the times are NaN or do not increase.
        TypeError: If a piece is not such a pair, its time is no number, or its control is itself a schedule.

    Example:
        >>> import flowfactor as ff
        >>> switch = ff.Schedule([(0.0, 0), (4.0, 2)])      # flow 0 up to frame 4, then flow 2
        >>> switch.at(3.9), switch.at(4.0)
        (0, 2)
    """

    def __init__(self, pieces: Sequence[tuple[float | Tensor, PieceControl]]) -> None:
        pieces = list(pieces)
        if not pieces:
            raise ValueError("a Schedule needs at least one piece (t_from, control), got none")
        for i, piece in enumerate(pieces):
            if not (isinstance(piece, tuple) and len(piece) == 2):
                raise TypeError(f"piece {i} of a Schedule must be a pair (t_from, control), got {piece!r}")
            if isinstance(piece[1], Schedule):
                raise TypeError(f"piece {i} of a Schedule is itself a Schedule; give an index or weights")
        self.moments: tuple[float | Tensor, ...] = tuple(_moment(i, piece[0]) for i, piece in enumerate(pieces))
        self.controls: tuple[PieceControl, ...] = tuple(piece[1] for piece in pieces)
        self._starts = self._read()

    @property
    def starts(self) -> tuple[float, ...]:
        """The starting times of the pieces; raises ValueError where learned ones have ceased to increase."""
        return self._read() if any(isinstance(moment, Tensor) for moment in self.moments) else self._starts

    def _read(self) -> tuple[float, ...]:
        starts = tuple(float(m.detach()) if isinstance(m, Tensor) else m for m in self.moments)
        if any(map(math.isnan, starts)) or any(b <= a for a, b in pairwise(starts)):
            raise ValueError(f"the times of a Schedule must increase strictly, got {list(starts)}")
        return starts

    def __repr__(self) -> str:
        return f"Schedule({list(zip(self.starts, self.controls, strict=True))!r})"

    def at(self, t: float) -> PieceControl:
        """Returns the control that acts at time ``t`` (at a switching time, the later one).

        Args:
            t: Time in frames.

        Returns:
            The piece's control.

        Raises:
            ValueError: If ``t`` lies before the first piece.
        """
        for start, control in zip(reversed(self.starts), reversed(self.controls), strict=True):
            if t >= start:
                return control
        raise ValueError(
            f"this Schedule starts at t={self.starts[0]:g} and says nothing about t={t:g}; "
            "give its first piece an earlier time, for example -math.inf"
        )

    def segments(self, t0: float, t1: float) -> list[tuple[float, float, PieceControl]]:
        """Cuts the way from ``t0`` to ``t1`` at the switching times.

        Args:
            t0: Start, in frames.
            t1: End, in frames; it may lie before ``t0``.

        Returns:
            Triples ``(from, to, control)`` in the order in which they are travelled.

        Raises:
            ValueError: If the way begins or ends before the first piece.
        """
        low, high = min(t0, t1), max(t0, t1)
        self.at(low)
        cuts = [low, *(s for s in self.starts if low < s < high), high]
        pieces = [(a, b, self.at(a)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        return pieces if t1 >= t0 else [(b, a, control) for a, b, control in reversed(pieces)]

    def spent(self, t: Tensor, since: Tensor) -> list[Tensor]:
        """How long each piece has acted on the way to a time; negative on a way back.

        Args:
            t: Times of any shape, in frames.
            since: Where the way begins, of a shape that broadcasts with that of ``t``.

        Returns:
            For each piece, the frames from ``since`` to ``t`` in which it acts, with the gradient of its ends.

        Raises:
            ValueError: If a way begins or ends before the first piece.

        Example:
            >>> import torch, flowfactor as ff
            >>> ff.Schedule([(0.0, 0), (4.0, 2)]).spent(torch.tensor([3.0, 6.0]), torch.tensor(1.0))
            [tensor([2., 3.]), tensor([0., 2.])]
        """
        if t.numel() and since.numel():
            self.at(min(float(t.detach().min()), float(since.detach().min())))
        ends = [torch.as_tensor(m, dtype=t.dtype, device=t.device).reshape(()) for m in (*self.moments, math.inf)]
        return [t.clamp(a, b) - since.clamp(a, b) for a, b in pairwise(ends)]


@dataclass(frozen=True)
class ResolvedControl:
    """A control checked against a batch: one flow for all, one flow per sample, or weights; and the context beside it.

    Attributes:
        index: The flow of all samples (int), or of each (LongTensor ``[*batch]``); None where weights act.
        weights: Weight of each flow for each sample ``[*batch, K]``; None where an index acts.
        context: Features of each sample ``[*batch, C]``, or such a tensor for each name; None for none.
    """

    index: int | Tensor | None
    weights: Tensor | None = None
    context: Context | None = None


def resolve(
    control: PieceControl,
    batch_shape: Sequence[int] | None,
    num_flows: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> ResolvedControl:
    """Checks a control and spreads it over a batch.

    Args:
        control: An int, an integer tensor that broadcasts to ``[*batch]``, or weights that broadcast to
            ``[*batch, K]``.
        batch_shape: The batch it has to fit, or None to keep the control's own.
        num_flows: K.
        dtype: Expected dtype of weights.
        device: Expected device of tensors.

    Returns:
        The checked control.

    Raises:
        TypeError: If it is no control, or weights are of another dtype.
        ValueError: If an index is out of range, or a shape, a device or a weight does not fit.

    Example:
        >>> resolve(1, (4,), 3, dtype=torch.float32, device=torch.device("cpu")).index
        1
    """
    if isinstance(control, Schedule):
        raise TypeError("a Schedule acts over time; ask it for the control of one time with schedule.at(t)")
    if not isinstance(control, Tensor):
        return ResolvedControl(_checked_int(control, num_flows))
    check_dense("a control", control)
    if control.device != device:
        raise ValueError(f"the control is on {control.device} and the state on {device}; move one with .to(...)")
    if control.dtype == torch.bool or control.is_complex():
        raise TypeError(f"a control must hold integers (flow indices) or floats (weights), got {control.dtype}")
    if not control.is_floating_point():
        index = control.long()  # before it is compared: torch compares few unsigned integers
        check_range(index, num_flows)
        if index.ndim == 0:
            return ResolvedControl(int(index))
        return ResolvedControl(index if batch_shape is None else spread(index, batch_shape, "index control"))
    if control.dtype != dtype:
        raise TypeError(
            f"weights are {control.dtype} and the state is {dtype}; convert one with .to(...). "
            "(A control that is meant as flow indices must hold integers: control.long())"
        )
    if control.ndim == 0 or control.shape[-1] != num_flows:
        raise ValueError(
            f"weights must have one entry a flow, shape [*batch, {num_flows}]; got shape {list(control.shape)}"
        )
    if not bool(torch.isfinite(control).all()):
        raise ValueError("weights must be finite, got NaN or infinity")
    if batch_shape is not None:
        control = spread(control, (*batch_shape, num_flows), "weights")
    return ResolvedControl(None, control)


def resolve_at(
    control: Control,
    t: Tensor,
    batch_shape: Sequence[int],
    num_flows: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> ResolvedControl:
    """Checks any control, schedules included, at a time ``t`` that is one for all or one per sample.

    Args:
        control: Any control.
        t: Scalar tensor or ``[*batch]``, in frames.
        batch_shape: The batch.
        num_flows: K.
        dtype: Expected dtype of weights.
        device: Expected device of tensors.

    Returns:
        The control that acts at ``t``.

    Raises:
        TypeError: As `resolve`.
        ValueError: As `resolve`, or if a time lies before the schedule's first piece.
    """
    if not isinstance(control, Schedule):
        return resolve(control, batch_shape, num_flows, dtype=dtype, device=device)
    if t.ndim == 0 or t.numel() <= 1:
        now = float(t.detach()) if t.numel() else control.starts[0]
        return resolve(control.at(now), batch_shape, num_flows, dtype=dtype, device=device)
    control.at(float(t.detach().min()))
    t = t.expand(tuple(batch_shape))
    pieces = [resolve(c, batch_shape, num_flows, dtype=dtype, device=device) for c in control.controls]
    if all(piece.weights is None for piece in pieces):
        index = torch.zeros(tuple(batch_shape), dtype=torch.long, device=device)
        for start, piece in zip(control.starts, pieces, strict=True):
            index = torch.where(t >= start, _as_index(piece, batch_shape, device), index)
        return ResolvedControl(index)
    weights = torch.zeros((*batch_shape, num_flows), dtype=dtype, device=device)
    for start, piece in zip(control.starts, pieces, strict=True):
        weights = torch.where((t >= start).unsqueeze(-1), as_weights(piece, batch_shape, num_flows, weights), weights)
    return ResolvedControl(None, weights)


def control_shape(control: Control) -> torch.Size:
    """Batch shape that a control asks for, whatever the number of flows.

    Args:
        control: Any control.

    Returns:
        [] for an int, [*batch] for indices or weights, what the pieces broadcast to for a Schedule.

    Raises:
        TypeError: If it is no control.
        ValueError: If weights have no dimension for the flows.

    Example:
        >>> import torch
        >>> control_shape(torch.ones(4, 3)), control_shape(2)
        (torch.Size([4]), torch.Size([]))
    """
    if isinstance(control, Schedule):
        return broadcast(*(control_shape(piece) for piece in control.controls))
    if isinstance(control, Tensor) and control.dtype != torch.bool and not control.is_complex():
        if not control.is_floating_point():
            return control.shape
        if control.ndim == 0:
            raise ValueError("weights must have one entry a flow, shape [*batch, K]; got a scalar")
        return control.shape[:-1]
    if not isinstance(control, Tensor | bool) and hasattr(control, "__index__"):
        return torch.Size()
    raise TypeError(
        "a control is an int, an integer tensor [*batch], float weights [*batch, K] or a flowfactor.Schedule; "
        f"got {control.dtype if isinstance(control, Tensor) else type(control).__name__}"
    )


def broadcast(*shapes: torch.Size) -> torch.Size:
    """Broadcasts the batch shapes of times and controls.

    Args:
        shapes: The shapes.

    Returns:
        What they broadcast to.

    Raises:
        ValueError: If they do not.

    Example:
        >>> import torch
        >>> broadcast(torch.Size((4, 1)), torch.Size((3,)))
        torch.Size([4, 3])
    """
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        listed = " and ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"times and controls must broadcast to one batch shape, got {listed}") from error


def as_weights(control: ResolvedControl, batch_shape: Sequence[int], num_flows: int, like: Tensor) -> Tensor:
    """Writes a resolved control as weights ``[*batch, K]`` of the dtype and device of ``like``."""
    if control.weights is not None:
        return control.weights
    index = _as_index(control, batch_shape, like.device)
    return torch.nn.functional.one_hot(index, num_flows).to(like)


def travelled(control: Control, t: Tensor, batch: int, num_flows: int) -> Tensor:
    """How far each flow has acted: the integral of its weight from ``t[0]`` on.

    Args:
        control: Which flow acts.
        t: Times ``[T]``.
        batch: B.
        num_flows: K.

    Returns:
        Integrals ``[T, B, K]``, in frames; with one index, t - t[0] for that flow and 0 for the others.

    Raises:
        TypeError: If it is no control.
        ValueError: If a flow does not exist or a shape does not fit.

    Example:
        >>> travelled(1, torch.tensor([0.0, 2.0]), 1, 2).tolist()
        [[[0.0, 0.0]], [[0.0, 2.0]]]
    """

    def weights(piece: PieceControl) -> Tensor:
        resolved = resolve(piece, (batch,), num_flows, dtype=t.dtype, device=t.device)
        return as_weights(resolved, (batch,), num_flows, t)

    if not isinstance(control, Schedule):
        return (t - t[0])[:, None, None] * weights(control)
    spent = zip(control.spent(t, t[0]), control.controls, strict=True)
    return sum((frames[:, None, None] * weights(piece) for frames, piece in spent), t.new_zeros(batch, num_flows))


def _moment(i: int, start: object) -> float | Tensor:
    """The starting time of a piece: the tensor itself where it asks for a derivative."""
    if isinstance(start, Tensor) and (start.numel() != 1 or start.is_complex()):
        raise ValueError(f"the time of piece {i} of a Schedule must be one real number, got {start!r}")
    try:
        return start if isinstance(start, Tensor) and (start.requires_grad or not is_plain()) else float(start)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(f"the time of piece {i} of a Schedule must be a number of frames, got {start!r}") from error


def _as_index(control: ResolvedControl, batch_shape: Sequence[int], device: torch.device) -> Tensor:
    if isinstance(control.index, Tensor):
        return control.index
    assert control.index is not None  # an invariant of ResolvedControl, not user input
    return torch.full(tuple(batch_shape), control.index, dtype=torch.long, device=device)


def _checked_int(control: object, num_flows: int) -> int:
    if isinstance(control, bool) or not hasattr(control, "__index__") or getattr(control, "ndim", 0):
        raise TypeError(
            "a control is an int, an integer tensor [*batch], float weights [*batch, K] or a flowfactor.Schedule; "
            f"got {type(control).__name__}"
        )
    index = int(control.__index__())  # type: ignore[attr-defined]
    if not 0 <= index < num_flows:
        raise ValueError(f"flow {index} does not exist: with {num_flows} flows an index runs from 0 to {num_flows - 1}")
    return index
