"""What acts in sequences in which transformations combine: modes, weights, and the control that they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowfactor.control import Schedule
from flowfactor.data.base import SequenceDataset

if TYPE_CHECKING:
    from typing_extensions import Self

COMBINED_MODES: tuple[str, ...] = ("single", "superpose", "switch")
"""How transformations act in a sequence of `CombinedImages` or `CombinedScenes`: one all along; two at once, all along;
one up to some frame and another from there."""

Modes = Sequence[str] | Mapping[str, float]


class CombinedSequences(SequenceDataset):
    """What data sets of combined and switching sequences share; see `CombinedImages` and `CombinedScenes`.

    An item has ``"frames"`` [T+1, C, H, W], ``"t"`` [T+1] and ``"weights"`` [T, K], float32: how strongly
    transformation k acts between frames s and s + 1, where 1 is its usual pace and 0 is not at all. So ``weights > 0``
    is the truth about which transformations are active, and `weights_schedule` makes a control of it. No single k
    names such a sequence: its ``"k"`` is -1.

    Attributes:
        weights: The weights of all sequences [N, T, K].
        modes: Names of the modes that occur.
        mode: The mode of each sequence [N], an index into `modes`.
    """

    weights: Tensor
    modes: tuple[str, ...]
    mode: Tensor

    @property
    def fixed_k(self) -> Tensor:
        """The transformation of every sequence [N]: -1, for there is not one."""
        return torch.full((len(self),), -1)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.weights)

    def _select(self, indices: Tensor) -> None:
        self.weights, self.mode = self.weights[indices], self.mode[indices]

    def weighted(self, weights: Tensor) -> Self:
        """Gives the same elements under weights of one's own, such as three transformations at once.

        Args:
            weights: Weights [T, K] of every sequence, or [N, T, K], from 0 to 1; see above.

        Returns:
            A data set of the same class, whose only mode is ``"given"``.

        Raises:
            ValueError: If the shape is none of these, a weight is outside [0, 1], or the data cannot show what is asked for.

        Example:
            >>> import flowfactor as ff
            >>> data = ff.data.CombinedImages(torch.rand(4, 1, 8, 8), ff.data.paper_transforms(2), steps=2, colour="red")
            >>> data.weighted(torch.ones(2, 3))[0]["weights"].tolist()
            [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
        """
        each = (self.num_steps, self.num_flows)
        if weights.shape not in (each, (len(self), *each)):
            raise ValueError(f"weights must be {list(each)} or {[len(self), *each]}, got {list(weights.shape)}")
        if weights.numel() and not bool(((weights >= 0) & (weights <= 1)).all()):
            raise ValueError(f"weights must lie in [0, 1], got {weights.min():g} to {weights.max():g}")
        part = copy.copy(self)
        part.weights = weights.to(self.weights).expand(len(self), *each).clone()
        part.modes, part.mode = ("given",), torch.zeros_like(self.mode)
        return part

    def plan(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        stratified: bool = True,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> list[tuple[Any, ...]]:
        """Draws one epoch; `stratified` changes nothing, for the sequences have no k to stratify by."""
        del stratified
        return super().plan(batch_size, generator=generator, stratified=False, shuffle=shuffle, drop_last=drop_last)

    def _draw(self, count: int, modes: Modes, strength: tuple[float, float], seed: int, never: Sequence[Any]) -> None:
        """Draws modes, transformations, switches and strengths of all sequences."""
        generator = torch.Generator().manual_seed(seed)
        shares = _checked_modes(modes)
        self.modes = tuple(shares)
        low, high = _checked_strength(strength)
        flows, steps = self.num_flows, self.num_steps
        pairs = [pair for pair in combinations(range(flows), 2) if set(pair) not in [set(p) for p in never]]
        if not pairs and set(self.modes) != {"single"}:
            raise ValueError(f"{' and '.join(self.modes)} need two transformations that combine: use modes=('single',)")
        if "switch" in shares and steps < 2:
            raise ValueError("a switch midway needs at least 2 steps, got 1")
        counts = _counts(list(shares.values()), count)
        mode = torch.arange(len(shares)).repeat_interleave(counts)
        self.mode = mode[torch.randperm(count, generator=generator)]
        self.weights = torch.zeros(count, steps, flows)
        for index, name in enumerate(self.modes):
            mine = (self.mode == index).nonzero().flatten()
            strengths = low + (high - low) * torch.rand(len(mine), 2, generator=generator)
            if name == "single":
                first, second = torch.randint(flows, (len(mine),), generator=generator), None
            else:
                drawn = torch.tensor(pairs)[torch.randint(len(pairs), (len(mine),), generator=generator)]
                swapped = torch.rand(len(mine), 1, generator=generator) < 0.5
                first, second = torch.where(swapped, drawn.flip(1), drawn).unbind(1)
            first_until = torch.full((len(mine),), steps)
            second_from = torch.zeros(len(mine), dtype=torch.long)
            if name == "switch":
                first_until = second_from = torch.randint(1, steps, (len(mine),), generator=generator)
            step = torch.arange(steps)
            self._act(mine, first, strengths[:, 0], step < first_until[:, None])
            if second is not None:
                self._act(mine, second, strengths[:, 1], step >= second_from[:, None])

    def _act(self, sequences: Tensor, flow: Tensor, strength: Tensor, when: Tensor) -> None:
        """Sets the weights of one flow in each of some sequences, at the steps when [n, T] it acts."""
        step = torch.arange(self.num_steps)
        self.weights[sequences[:, None], step, flow[:, None]] += strength[:, None] * when


def weights_schedule(weights: Tensor, t: Tensor | Sequence[float] | None = None) -> Schedule:
    """Makes the control under which a flow does what weights say.

    Args:
        weights: Weights [T, K] of one sequence, or [B, T, K] of a batch.
        t: Times of the frames [T+1], rising or falling; by default 0, 1, ..., T.

    Returns:
        A `flowfactor.Schedule` with weights [K] or [B, K], with a piece for each run of frames in which they stay the
        same. The last piece goes on after the last frame.

    Raises:
        ValueError: If the shapes are not these.

    Example:
        >>> weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> weights_schedule(weights)
        Schedule([(0.0, tensor([1., 0.])), (2.0, tensor([0., 1.]))])
        >>> weights_schedule(weights, torch.tensor([0.0, -1.0, -2.0, -3.0]))  # the last acts earliest
        Schedule([(-3.0, tensor([0., 1.])), (-2.0, tensor([1., 0.]))])
    """
    if weights.ndim not in (2, 3) or not weights.shape[-2] or not weights.is_floating_point():
        raise ValueError(
            f"weights must be floating point [T, K] or [B, T, K], got {weights.dtype} {list(weights.shape)}"
        )
    steps = weights.unbind(-2)
    times = list(range(len(steps) + 1)) if t is None else torch.as_tensor(t).tolist()
    if len(times) != len(steps) + 1:
        raise ValueError(f"weights of {len(steps)} steps need {len(steps) + 1} times, got {len(times)}")
    if times[-1] < times[0]:
        steps, times = steps[::-1], times[::-1]
    changed = [s for s, now in enumerate(steps) if s == 0 or not torch.equal(now, steps[s - 1])]
    return Schedule([(times[s], steps[s]) for s in changed])


def _checked_modes(modes: Modes) -> dict[str, float]:
    given = (modes,) if isinstance(modes, str) else modes
    shares = {name: float(modes[name]) if isinstance(modes, Mapping) else 1.0 for name in given}
    if not shares or len(shares) < len(given) or not set(shares) <= set(COMBINED_MODES):
        raise ValueError(f"modes must be distinct names out of {', '.join(COMBINED_MODES)}, got {modes!r}")
    if not all(0 < share < float("inf") for share in shares.values()):
        raise ValueError(f"shares of modes must be finite and above 0, got {modes!r}")
    return shares


def _checked_strength(strength: tuple[float, float]) -> tuple[float, float]:
    if not (isinstance(strength, Sequence) and len(strength) == 2 and 0 < strength[0] <= strength[1] <= 1):
        raise ValueError(f"strength is a range (low, high) with 0 < low <= high <= 1, got {strength!r}")
    return float(strength[0]), float(strength[1])


def _counts(shares: list[float], total: int) -> Tensor:
    """Divides a number by shares, as evenly as whole numbers allow."""
    ends = (torch.tensor(shares, dtype=torch.float64).cumsum(0) / sum(shares) * total).round().long()
    return ends.diff(prepend=torch.zeros(1, dtype=torch.long))
