"""Data sets on a grid of factors: sequences move along the grid, and everything else about a scene holds exactly."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.data.base import Batch, SequenceDataset
from flowfactor.data.checks import check_times

Stride = int | Mapping[str, int]


class FactorSequences(SequenceDataset):
    """Sequences in which one factor of a scene moves and all others hold exactly.

    Every scene is a combination of F factors, each with a number of states, and there is a picture of every
    combination. An index names a scene, with the moved factors running fastest; the factor that moves, k, is drawn per
    epoch (see `SequenceDataset`). A sequence lets factor k run upwards over T + 1 equally spaced states. It starts at
    the scene's own state or, where too few follow, at the last from which T steps fit. A factor on a circle goes on
    past its zero instead, with at most one turn, so that no frame comes twice.

    The test split holds out scenes so that no frame of one split is in the other, however its sequences are drawn. In
    general it holds out combinations of the factors that no sequence moves, chosen by a hash. Where all factors move,
    or too few combinations of the others are left to hold out such a share, it holds out edges: scenes in which either
    of two moved factors is among the first of its states. A test sequence that moves one of the two keeps the other
    there.

    Subclasses call `_lay_out`, set `image_shape` and implement `images_at`. `Scenes`, `Shapes3D`, `DSprites`,
    `Falcor3D`, `Isaac3D` and `SmallNORB` are such data sets.

    Attributes:
        factor_names: Names of the F factors.
        values: The values of each factor's states, float64.
        split: ``"train"``, ``"test"`` or ``"all"``.
    """

    factor_names: tuple[str, ...]
    values: tuple[Tensor, ...]
    split: str
    _subset: Tensor | None = None

    def _lay_out(
        self,
        names: Sequence[str],
        values: Sequence[Tensor],
        *,
        vary: Sequence[str],
        steps: int,
        split: str,
        held_out: float = 0.2,
        t: Tensor | Sequence[float] | None = None,
        cyclic: Sequence[str] = (),
        stride: Stride = 1,
        edges: Sequence[str] = (),
    ) -> None:
        """Sets the grid, what moves on it, and the split.

        Args:
            names: Names of the factors.
            values: Values of each factor's states.
            vary: Names of the K factors that move, in the order of k.
            steps: Number T of steps.
            split: ``"train"``, ``"test"`` or ``"all"``.
            held_out: Share of the scenes that the test split holds out.
            t: Times of the frames [T+1].
            cyclic: Names of the factors on a circle.
            stride: States per step, one for all factors or by name.
            edges: The two factors whose edges are held out where all move; by default the two with the most states.

        Raises:
            ValueError: If an argument is wrong, a moved factor has too few states, or nothing can be held out.
        """
        if split not in ("train", "test", "all"):
            raise ValueError(f"split is 'train', 'test' or 'all', got {split!r}")
        self.t = check_times(t, steps)
        self.split, self.factor_names, self.values = split, tuple(names), tuple(values)
        self.flow_names = checked_names(vary, self.factor_names, "vary")
        self._cyclic = torch.tensor([name in cyclic for name in self.factor_names])
        self._strides = _checked_strides(stride, self.factor_names)
        self._moved = [self.factor_names.index(name) for name in self.flow_names]
        for factor in self._moved:
            needed = steps * int(self._strides[factor]) + 1
            if len(self.values[factor]) < needed:
                raise ValueError(
                    f"{self.factor_names[factor]} has {len(self.values[factor])} states, but a sequence of {steps} "
                    f"steps runs over {needed}: give it more states, or take fewer steps"
                )
        self._split_scenes(held_out, edges)

    def _split_scenes(self, held_out: float, edges: Sequence[str]) -> None:
        """Lays out the split's scenes: the listed combinations of some factors, each with every state of the others."""
        sizes = self.factor_sizes
        if self.split != "all" and not 0 < held_out < 1:
            raise ValueError(f"held_out is a share between 0 and 1, got {held_out!r}")
        self._edge: dict[int, int] = {}  # factors whose edge is held out, and how many states the edge has
        held = [factor for factor in range(len(sizes)) if factor not in self._moved]
        count = math.prod(sizes[factor] for factor in held)
        if self.split != "all" and count * held_out < 1:
            self._edge = self._edges(held_out, edges)
            if not self._edge and count < 2:
                raise ValueError(
                    "every factor moves, so no combination can be held out, and no two factors that are not on a "
                    f"circle have more than {len(self.t)} states for an edge to be: use split='all', or let fewer move"
                )
        self._listed = list(self._edge) or held
        self._crossed = [factor for factor in self._moved if factor not in self._listed]
        if self._edge:
            self._crossed = [factor for factor in held if factor not in self._listed] + self._crossed
            self._combinations = _edge_combinations(self._edge, sizes, self.split)
        else:
            self._combinations = _combinations([sizes[factor] for factor in held], self.split, held_out)

    def _edges(self, held_out: float, wanted: Sequence[str]) -> dict[int, int]:
        """Finds two moved factors, and the numbers of their states at the edge whose share is nearest to `held_out`."""
        spare = {
            factor: len(self.values[factor]) - self.num_steps * int(self._strides[factor]) - 1
            for factor in self._moved
            if not self._cyclic[factor]
        }
        able = [factor for factor, states in spare.items() if states > 0]
        able.sort(key=lambda factor: (self.factor_names[factor] not in wanted, -len(self.values[factor])))
        if len(able) < 2:
            return {}
        first, second = able[:2]
        one, two = len(self.values[first]), len(self.values[second])
        pairs = [(a, b) for a in range(1, spare[first] + 1) for b in range(1, spare[second] + 1)]
        a, b = min(pairs, key=lambda ab: abs(1 - (1 - ab[0] / one) * (1 - ab[1] / two) - held_out))
        return {first: a, second: b}

    @property
    def factor_sizes(self) -> tuple[int, ...]:
        """Numbers of states of the F factors."""
        return tuple(len(value) for value in self.values)

    @property
    def apart(self) -> list[tuple[int, int]]:
        """Pairs of transformations k that cannot move in one sequence without leaving the split."""
        if not self._edge or self.split != "test":
            return []
        first, second = (self._moved.index(factor) for factor in self._edge)
        return [(first, second)]

    def __len__(self) -> int:
        """Number of scenes."""
        if self._subset is not None:
            return len(self._subset)
        return len(self._combinations) * math.prod(self.factor_sizes[factor] for factor in self._crossed)

    def _select(self, indices: Tensor) -> None:
        self._subset = indices if self._subset is None else self._subset[indices]

    def scenes(self, indices: Tensor) -> Tensor:
        """Gives the states of the factors of scenes.

        Args:
            indices: Scenes [B], each in [0, len).

        Returns:
            States [B, F], int64.
        """
        indices = indices if self._subset is None else self._subset[indices]
        crossed = [self.factor_sizes[factor] for factor in self._crossed]
        scene = torch.empty(len(indices), len(self.factor_names), dtype=torch.long)
        scene[:, self._listed] = self._combinations[indices // math.prod(crossed)]
        if crossed:
            scene[:, self._crossed] = torch.stack(torch.unravel_index(indices % math.prod(crossed), crossed), -1)
        return scene

    def states(self, indices: Tensor, k: Tensor) -> Tensor:
        """Gives the states of the factors in sequences, as integers.

        Args:
            indices: Scenes [B].
            k: Factors that move [B].

        Returns:
            States [B, T+1, F]; `factors` turns them into values.
        """
        moves = torch.nn.functional.one_hot(k, self.num_flows)
        return self.walk(indices, moves[:, None].expand(-1, self.num_steps, -1))

    def walk(self, indices: Tensor, moves: Tensor) -> Tensor:
        """Gives the states of the factors in sequences in which several factors may move, one after another or at once.

        Args:
            indices: Scenes [B].
            moves: Whether each of the K factors moves between two frames [B, T, K], as 0 or 1.

        Returns:
            States [B, T+1, F].
        """
        scene = self.scenes(indices)
        sizes, moved = torch.tensor(self.factor_sizes)[self._moved], self._moved
        way = moves.long().cumsum(1) * self._strides[moved]
        way = torch.cat([torch.zeros_like(way[:, :1]), way], 1)
        if self._edge and self.split == "test":
            self._keep_at_the_edge(scene, way[:, -1] > 0)
        start = scene[:, moved]
        latest = sizes - 1 - way[:, -1]
        cyclic = self._cyclic[moved]
        start = torch.where(cyclic, start, torch.minimum(start, latest))
        states = scene[:, None].repeat(1, way.shape[1], 1)
        states[..., moved] = torch.where(cyclic, (start[:, None] + way) % sizes, start[:, None] + way)
        return states

    def _keep_at_the_edge(self, scene: Tensor, active: Tensor) -> None:
        """Where one of the two edge factors moves, puts the other back among the states that are held out."""
        first, second = self._edge
        for mover, other in ((first, second), (second, first)):
            moving = active[:, self._moved.index(mover)]
            scene[moving, other] %= self._edge[other]

    def factors(self, states: Tensor) -> Tensor:
        """Turns states into the values of the factors.

        Args:
            states: States [*batch, F].

        Returns:
            Values [*batch, F], float64.
        """
        return torch.stack([value[states[..., factor]] for factor, value in enumerate(self.values)], -1)

    @abstractmethod
    def images_at(self, states: Tensor) -> Tensor:
        """Gives the pictures of scenes.

        Args:
            states: States [*batch, F] of scenes of this split.

        Returns:
            Pictures [*batch, C, H, W], float32 in [0, 1].
        """

    def factor_samples(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws single pictures with the states of all their factors: what measures of disentanglement need.

        Args:
            n: Number of pictures, drawn uniformly from the scenes of the split, with replacement.
            generator: Source of the draw; None is torch's global one.

        Returns:
            Pictures [n, C, H, W] in [0, 1], and labels [n, F], int64: the state of each of `factor_names`, below
            `factor_sizes`.

        Raises:
            TypeError: If `n` is no integer.
            ValueError: If it is below 1.

        Example:
            >>> import flowfactor as ff
            >>> data = ff.data.Scenes("test", size=8, steps=1, hues=3, scales=2, orientations=4)
            >>> images, labels = data.factor_samples(5)
            >>> images.shape, labels.shape, data.factor_sizes
            (torch.Size([5, 3, 8, 8]), torch.Size([5, 6]), (3, 3, 3, 2, 5, 4))
        """
        n = check_count("n", n)
        device = generator.device if generator is not None else None
        labels = self.scenes(torch.randint(len(self), (n,), generator=generator, device=device).cpu())
        return self.images_at(labels), labels.to(self.t.device)

    def _substance(self, indices: Tensor) -> Tensor:
        return self.images_at(self.states(indices, indices % self.num_flows)[:, 0])

    def _frames(self, indices: Tensor, k: Tensor) -> Batch:
        return self._pictures(self.states(indices, k))

    def _pictures(self, states: Tensor) -> Batch:
        """Gives the frames of states [B, T+1, F], and the values of the factors with them."""
        return {"frames": self.images_at(states), "factors": self.factors(states).float()}

    def _reached(self, factors: Sequence[int]) -> Tensor:
        """Gives the distinct combinations [n, len(factors)] of some factors' states in this split, sorted."""
        sizes = self.factor_sizes
        listed = torch.zeros(len(self._combinations), len(sizes), dtype=torch.long)
        listed[:, self._listed] = self._combinations
        listed = listed[:, list(factors)].unique(dim=0)
        ranges = [torch.arange(sizes[f]) if f in self._crossed else torch.zeros(1).long() for f in factors]
        moves = torch.cartesian_prod(*ranges).reshape(-1, len(factors))
        # Each factor is either listed, and moves by 0 alone, or crossed, and is 0 in the list.
        return (listed[:, None] + moves).reshape(-1, len(factors)).unique(dim=0)


def checked_names(given: Sequence[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    """Checks names that a user chose.

    Args:
        given: The names.
        known: Those to choose from.
        what: What they are called in the message.

    Returns:
        The names.

    Raises:
        ValueError: If there are none, one comes twice or is unknown.
    """
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names or len(set(names)) < len(names) or not set(names) <= set(known):
        raise ValueError(f"{what} must be distinct names out of {', '.join(known)}, got {given!r}")
    return names


def _checked_strides(stride: Stride, names: tuple[str, ...]) -> Tensor:
    given = dict(stride) if isinstance(stride, Mapping) else dict.fromkeys(names, stride)
    unknown = set(given) - set(names)
    if unknown:
        raise ValueError(f"stride names {', '.join(sorted(unknown))}, but the factors are {', '.join(names)}")
    for name, states in given.items():
        check_count("stride", states, note=f"states per step, of {name}")
    return torch.tensor([given.get(name, 1) for name in names])


def _combinations(counts: list[int], split: str, held_out: float) -> Tensor:
    """Gives the combinations [n, held] of the held factors' states in a split."""
    every = torch.cartesian_prod(*map(torch.arange, counts)).reshape(-1, len(counts)) if counts else torch.zeros(1, 0)
    every = every.long()
    if split == "all":
        return every
    # The combinations with the smallest hash: the share is exact, and the choice random to look at but always the same.
    ranked = np.argsort(_hash(np.arange(len(every))), kind="stable")
    number = min(max(round(held_out * len(every)), 1), len(every) - 1)
    chosen = ranked[:number] if split == "test" else ranked[number:]
    return every[torch.from_numpy(np.sort(chosen))]


def _edge_combinations(edge: dict[int, int], sizes: Sequence[int], split: str) -> Tensor:
    """Gives the states [n, 2] of the two edge factors: for testing, those with at least one of the two at its edge."""
    (first, a), (second, b) = edge.items()
    every = torch.cartesian_prod(torch.arange(sizes[first]), torch.arange(sizes[second]))
    test = (every[:, 0] < a) | (every[:, 1] < b)
    return every[test if split == "test" else ~test]


def _hash(values: np.ndarray) -> np.ndarray:
    """Mixes the bits of integers (Knuth's multiplicative hashing, twice, modulo 2^64)."""
    values = values.astype(np.uint64)
    for _ in range(2):
        values = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        values ^= values >> np.uint64(29)
    return values
