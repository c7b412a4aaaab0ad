"""What all data sets of image sequences share: items, batches, stratified epochs, resumable loaders."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowfactor.data.checks import sha256_of
from flowfactor.data.epochs import Batch, draw_epoch
from flowfactor.data.loader import SequenceLoader
from flowfactor.data.starts import Direction, Draw, Start, check_start

if TYPE_CHECKING:
    from typing_extensions import Self

Index: TypeAlias = int | tuple[int, int]

_LOOKED_AT = 32  # elements in a fingerprint
_ALONG_TIME = ("frames", "mask", "factors", "weights")  # what a batch holds of frames, or of steps between them


class SequenceDataset(Dataset[dict[str, Any]]):
    """A data set of image sequences in which one of K transformations acts.

    An item is a dictionary with ``"frames"`` [T+1, C, H, W] float32 in [0, 1], ``"k"`` the index of the acting
    transformation and ``"t"`` [T+1] the times of the frames. A batch has ``"frames"`` [B, T+1, C, H, W], ``"k"`` [B]
    int64 and the times ``"t"`` [T+1], which all its sequences share.

    A data set may give more beside ``"frames"``, by the names that models know: own times of each sequence in place of these
    (``"t"`` [B, T+1]), which frames were observed (``"mask"`` [B, T+1], True where so), and features that steer a flow
    (``"context"`` [B, C], or such a tensor for each name); see `Sequences`.

    Two kinds of data sets differ in whose choice k is. Where any transformation can be applied to any element
    (`TransformedImages`, `Scenes`), an index names the element, `batches` draws its k anew in every epoch,
    ``dataset[i]`` takes ``k = i % K``, and ``dataset[i, k]`` any. Where sequences are recorded (`Sequences`), k is what
    their label says; without labels it is -1 and `num_flows` is 0.

    Sequences may also run backwards (see `running`): their frames come from the last to the first, at times that fall. All
    sequences of a batch run one way and share their times ``[T+1]``, so that any method can be trained on them, also those
    that take no times of each sequence. With ``direction="both"`` every other batch of an epoch runs backwards, the first or
    the second by a draw; what is asked for by its index runs forward.

    Subclasses set the attributes below, and implement `__len__` and `_frames`.

    Attributes:
        flow_names: Names of the K transformations.
        image_shape: (C, H, W).
        t: Times of the frames [T+1], float32.
        begins: Whether sequences begin at a ``"first"`` state that the data decide, or at ``"any"``.
        runs: Whether they run ``"forward"``, ``"backward"`` or, batch by batch, ``"both"`` ways.
    """

    flow_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    t: Tensor
    begins: Start = "first"
    runs: Direction = "forward"
    _beyond: float = 0.0  # how much time sequences go on after their usual end
    _tensors: tuple[str, ...] = ("t",)  # names of the attributes that `to` moves

    @property
    def num_flows(self) -> int:
        """Number K of transformations."""
        return len(self.flow_names)

    @property
    def num_steps(self) -> int:
        """Number T of steps: a sequence has T + 1 frames."""
        return len(self.t) - 1

    @property
    def fixed_k(self) -> Tensor | None:
        """The transformation of every element [len], on the CPU, where the data decides it, else None."""
        return None

    @property
    def context_size(self) -> int | dict[str, int]:
        """C, the number of features that each sequence has as its context, or a number for each name; 0 for none."""
        return 0

    @abstractmethod
    def __len__(self) -> int:
        """Number of elements that an index can name."""

    @abstractmethod
    def _frames(self, indices: Tensor, k: Tensor) -> Batch:
        """Makes sequences: checked indices [B] and k [B] to ``"frames"`` and whatever else the batch holds."""

    def _drawn(self, indices: Tensor, k: Tensor, draw: Draw) -> Batch:
        """Makes sequences as `_frames` does, from the starts and in the direction that are drawn."""
        made = self._frames(indices, k)
        if not draw.is_backward:
            return made
        return {name: value.flip(1) if name in _ALONG_TIME else value for name, value in made.items()}

    def _select(self, indices: Tensor) -> None:
        """Keeps the elements of checked indices, in place: called on a shallow copy by `subset`."""
        raise TypeError(f"{type(self).__name__} has no subsets")

    def __getitem__(self, index: Index) -> dict[str, Any]:
        """Gives one sequence: ``dataset[i]``, or ``dataset[i, k]`` where any transformation can be applied."""
        index, k = index if isinstance(index, tuple) else (index, None)
        if not -len(self) <= index < len(self):
            # An IndexError, not a ValueError: it is what ends a for-loop over the data set.
            raise IndexError(f"index {index} is out of range for a data set of {len(self)}")
        batch = self.batch(torch.tensor([index % len(self)]), k)
        return {key: _first(value, key) for key, value in batch.items()} | {"k": int(batch["k"])}

    def batch(
        self,
        indices: Tensor | Sequence[int],
        k: Tensor | Sequence[int] | int | None = None,
        draw: Draw | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Batch:
        """Makes a batch of sequences at once.

        Args:
            indices: Elements [B], each in [0, len).
            k: Transformations [B], or one for all. None takes the labels where the data set has them; elsewhere it
                draws k uniformly with `generator`, or takes ``index % K`` if there is none.
            draw: What else `plan` drew for the batch: the seed of starts, and the direction. None is the same for ever,
                as test sets are, and forward unless all run backwards.
            generator: Source of the draw of k.

        Returns:
            ``{"frames": [B, T+1, C, H, W], "k": [B], "t": [T+1]}``, in the order of `indices`.

        Raises:
            ValueError: If an index or a k is out of range, or contradicts a label, or the shapes do not match.

        Example:
            >>> import flowfactor as ff
            >>> images = torch.rand(10, 1, 16, 16)
            >>> data = ff.data.TransformedImages(images, {"turn": (ff.data.Rotate(), 0, 80)}, steps=4)
            >>> {name: list(value.shape) for name, value in data.batch([3, 7], k=0).items()}
            {'frames': [2, 5, 1, 16, 16], 'k': [2], 't': [5]}
        """
        indices = self._indices(indices)
        k = self._resolve(indices, k, generator)
        draw = draw or Draw(is_backward=self.runs == "backward")
        made = self._drawn(indices, k, draw)
        t = made.pop("t", self.t)
        if draw.is_backward:
            # Where any state may be the first, so may the last frame's: its time is that of a start, others lie before.
            t = t.flip(-1) - (t[..., -1:] - t[..., :1] if self.begins == "any" else self._beyond)
        return {"frames": made.pop("frames"), "k": k.to(self.t.device), "t": t, **made}

    def running(self, *, start: Start | None = None, direction: Direction | None = None) -> Self:
        """Gives the same elements, begun elsewhere or run another way.

        Args:
            start: ``"first"`` or ``"any"``; None as it is.
            direction: ``"forward"``, ``"both"`` or ``"backward"``; None as it is.

        Returns:
            A data set of the same class which shares everything with this one.

        Raises:
            ValueError: If the data cannot begin so, or there is no such direction.

        Example:
            >>> import flowfactor as ff
            >>> data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=4)
            >>> back = data.running(direction="backward").batch([0])
            >>> torch.equal(back["frames"].flip(1), data.batch([0])["frames"]), back["t"]
            (True, tensor([4., 3., 2., 1., 0.]))
            >>> data.running(start="any", direction="backward").batch([0])["t"]
            tensor([ 0., -1., -2., -3., -4.])
        """
        check_start(self.begins if start is None else start, self.runs if direction is None else direction)
        if start not in (None, self.begins):
            raise ValueError(
                f"sequences of {type(self).__name__} begin where the data say (start={self.begins!r}), not at {start!r}: "
                "those of TransformedImages, MNIST, Digits and CombinedImages may"
            )
        part = copy.copy(self)
        part.runs = direction or self.runs
        return part

    def subset(self, indices: Tensor | Sequence[int] | Sequence[bool]) -> Self:
        """Gives the same data set with some of its elements only.

        Args:
            indices: Indices to keep, or a mask [len] of booleans.

        Returns:
            A data set of the same class which shares what it can with this one.

        Raises:
            ValueError: If an index is out of range, the mask has another length, or nothing is kept.
        """
        chosen = torch.as_tensor(indices)
        if chosen.dtype == torch.bool:
            if chosen.shape != (len(self),):
                raise ValueError(f"a mask must have shape [{len(self)}], got {list(chosen.shape)}")
            chosen = chosen.nonzero().flatten()
        chosen = self._indices(chosen)
        if not len(chosen):
            raise ValueError("a subset needs at least one element, and none is chosen")
        part = copy.copy(self)
        part._select(chosen)
        return part

    def to(self, device: torch.device | str) -> Self:
        """Gives the same data set with its data on another device, where batches are then made."""
        moved = copy.copy(self)
        for name in self._tensors:
            value = getattr(self, name)
            setattr(moved, name, None if value is None else value.to(device))
        return moved

    def fingerprint(self) -> dict[str, Any]:
        """Tells these data from others of the same name: by their size, and a hash of some elements.

        It does not depend on where the data lie, how their files are packed, or the device. It takes a moment, even
        where the pictures lie in files: a few elements are read, always the same ones.

        Returns:
            Plain values: ``class``, ``elements``, ``image_shape``, ``steps``, ``flows`` and ``sha256``.

        Example:
            >>> import flowfactor as ff
            >>> first, second = ff.data.Sequences(torch.zeros(6, 4, 8, 8)), ff.data.Sequences(torch.ones(6, 4, 8, 8))
            >>> first.fingerprint()["elements"], first.fingerprint()["image_shape"]
            (6, [1, 8, 8])
            >>> first.fingerprint()["sha256"] == second.fingerprint()["sha256"]
            False
        """
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(self), generator=generator)[:_LOOKED_AT].sort().values
        labels = getattr(self, "labels", None)
        marks = self._marks(chosen)
        if (self.begins, self.runs) != ("first", "forward"):
            marks.append(torch.tensor(list(f"{self.begins} {self.runs}".encode()), dtype=torch.uint8))
        parts = (self._substance(chosen), self.fixed_k, None if labels is None else labels[chosen])
        return {
            "class": type(self).__name__,
            "elements": len(self),
            "image_shape": list(self.image_shape),
            "steps": self.num_steps,
            "flows": list(self.flow_names),
            "sha256": sha256_of(marks, [part for part in parts if part is not None]),
        }

    def _marks(self, indices: Tensor) -> list[Tensor]:
        """What else tells elements apart, for the fingerprint."""
        return []

    def _substance(self, indices: Tensor) -> Tensor:
        """What elements are made of, for the fingerprint: the same on every device, as pictures that are read are."""
        return self.batch(indices, None if self.fixed_k is not None else indices % self.num_flows)["frames"]

    def plan(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        stratified: bool = True,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> list[tuple[Any, ...]]:
        """Draws one epoch: what each batch will hold, before any frame is made. `batches` documents the arguments.

        Returns:
            A list of what `batch` takes: (indices [B], k [B]), sorted by k, with a draw where starts or ways are drawn.
        """
        draws: dict[str, Any] = {"generator": generator, "stratified": stratified, "shuffle": shuffle}
        epoch = draw_epoch(len(self), self.num_flows, self.fixed_k, batch_size, drop_last=drop_last, **draws)
        if self.begins == "first" and self.runs != "both":
            return list(epoch)
        device = generator.device if generator else None
        seed, turn = torch.randint(2**62, (2,), generator=generator, device=device).tolist() if shuffle else (0, 0)
        way = {"forward": (False, False), "backward": (True, True), "both": (turn % 2 == 1, turn % 2 == 0)}[self.runs]
        return [(*drawn, Draw(seed, way[n % 2])) for n, drawn in enumerate(epoch)]

    def batches(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        stratified: bool = True,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> Iterator[Batch]:
        """Yields the batches of one epoch, each sorted by k.

        Every element is drawn at most once. All draws are made before the first batch.

        Args:
            batch_size: Sequences per batch.
            generator: Source of the draws; None is torch's global one.
            stratified: As many sequences of each k in every batch. Where K does not divide `batch_size` the numbers
                differ by one, and which k has one more goes round from batch to batch. Labelled sequences are drawn
                until one label runs out. False draws k uniformly, or takes labels as they come.
            shuffle: Draw the elements in random order.
            drop_last: Leave out a last, incomplete batch.

        Yields:
            Batches as `batch` makes them.

        Raises:
            ValueError: If `batch_size` does not suit the data set.

        Example:
            >>> import flowfactor as ff
            >>> images = torch.rand(10, 1, 16, 16)
            >>> flows = {"turn": (ff.data.Rotate(), 0, 80), "grow": (ff.data.Scale(), 1, 1.8)}
            >>> data = ff.data.TransformedImages(images, flows, steps=4)
            >>> [batch["k"].tolist() for batch in data.batches(4)]
            [[0, 0, 1, 1], [0, 0, 1, 1]]
        """
        epoch = self.plan(batch_size, generator=generator, stratified=stratified, shuffle=shuffle, drop_last=drop_last)
        return (self.batch(*drawn) for drawn in epoch)

    def loader(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        stratified: bool = True,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> SequenceLoader:
        """Makes an iterable over epochs which knows its position, for training; see `SequenceLoader`.

        Args:
            batch_size: Sequences per batch.
            generator: Source of the seed of all epochs, drawn once, here.
            stratified: See `batches`.
            shuffle: See `batches`.
            drop_last: See `batches`.
            rank: Which process this is.
            world_size: Number of processes, which share out the batches of each epoch.

        Returns:
            The loader.

        Raises:
            ValueError: If an argument does not suit the data set.
        """
        settings = {"stratified": stratified, "shuffle": shuffle, "drop_last": drop_last}
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else None))
        return SequenceLoader(self, batch_size, seed=seed, rank=rank, world_size=world_size, **settings)

    def _indices(self, indices: Tensor | Sequence[int]) -> Tensor:
        indices = torch.as_tensor(indices)
        if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
            if not indices.numel() and indices.ndim == 1:
                return indices.long()  # an empty list has no integer dtype to show
            raise ValueError(f"indices must be integers [B], got {indices.dtype} {list(indices.shape)}")
        if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < len(self)):
            raise ValueError(f"indices must lie in [0, {len(self)}), got {int(indices.min())} to {int(indices.max())}")
        return indices.long().cpu()

    def _resolve(
        self, indices: Tensor, k: Tensor | Sequence[int] | int | None, generator: torch.Generator | None
    ) -> Tensor:
        """Works out the k [B] of checked indices, and checks what the caller gave."""
        labels = self.fixed_k
        if k is None:
            if labels is not None:
                return labels[indices]
            if generator is None:
                return indices % self.num_flows
            return torch.randint(self.num_flows, indices.shape, generator=generator, device=generator.device).cpu()
        k = torch.as_tensor(k).cpu()
        k = k.expand(indices.shape) if k.ndim == 0 else k
        if k.shape != indices.shape or k.is_floating_point():
            raise ValueError(f"k must be an integer or integers [{len(indices)}], got {k.dtype} {list(k.shape)}")
        if labels is not None and not torch.equal(k.to(labels), labels[indices]):
            raise ValueError("k contradicts the labels of these sequences: leave k out, or choose other indices")
        if labels is None and len(k) and not (int(k.min()) >= 0 and int(k.max()) < self.num_flows):
            raise ValueError(
                f"k must lie in [0, {self.num_flows}) ({', '.join(self.flow_names)}), "
                f"got {int(k.min())} to {int(k.max())}"
            )
        return k.long()


def _first(value: Any, name: str) -> Any:
    """What a batch of one holds of its sequence; times that all share are its own."""
    if isinstance(value, dict):
        return {part: features[0] for part, features in value.items()}
    return value if name == "t" and value.ndim == 1 else value[0]
