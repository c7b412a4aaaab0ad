"""Transformations by single latent dimensions, for models that have none of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from flowfactor._evaluating import evaluating
from flowfactor.control import Control, times, travelled
from flowfactor.data import SequenceDataset
from flowfactor.metrics.equivariance import EquivarianceError, equivariance_error, every_flow
from flowfactor.models.checks import check_frames
from flowfactor.models.inputs import refuse_beside, refuse_missing
from flowfactor.models.protocols import Autoencodes, code_of

_RANGES = tuple(half / 2 for half in range(-12, 13))
_FINALISTS = 4
_REFINEMENTS = 5


class Traversal(NamedTuple):
    """The latent dimension that does most of what a transformation does.

    Attributes:
        dimension: The dimension.
        range: How far it moves, in latent units, from the first frame to the last.
    """

    dimension: int
    range: float


class TraversalModel:
    """A model whose transformations are traversals of single latent dimensions.

    Flow k moves dimension ``traversals[k].dimension`` at a constant rate, from the mean of the posterior. It can be
    handed to what takes a model with ``transform``, such as `equivariance_error`, `vp_score` and `composition_error`.

    Args:
        model: A model with ``encode`` and ``decode``.
        traversals: The dimension and range of each of K transformations.
        span: Time in frames in which a range is travelled: that from the first frame to the last in the search.

    Raises:
        ValueError: If there are no traversals, or the span is not positive.

    Example:
        >>> import torch, flowfactor as ff
        >>> vae = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8))
        >>> model = ff.metrics.TraversalModel(vae, [ff.metrics.Traversal(3, 2.0)], span=8)
        >>> model.path(torch.zeros(1, 4), torch.tensor([0.0, 4.0, 8.0]), 0)[:, 0, 3].tolist()
        [0.0, 1.0, 2.0]
    """

    def __init__(self, model: Autoencodes, traversals: Sequence[Traversal], span: float) -> None:
        if not traversals:
            raise ValueError("at least one traversal is needed, got none")
        if not span > 0:
            raise ValueError(f"span is the time from the first frame to the last, above 0, got {span!r}")
        self.model, self.span = model, float(span)
        self.traversals = tuple(Traversal(*traversal) for traversal in traversals)

    @property
    def num_flows(self) -> int:
        """K, the number of transformations."""
        return len(self.traversals)

    def encode(self, x: Tensor) -> Distribution:
        """The model's posterior of frames ``[*batch, C, H, W]``."""
        return self.model.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """The model's mean frames of latents ``[*batch, D]``."""
        return self.model.decode(z)

    def path(self, z0: Tensor, t: Tensor | Sequence[float], control: Control = 0) -> Tensor:
        """Latents along the traversals.

        Args:
            z0: Latents at ``t[0]``, ``[B, D]``.
            t: Times ``[T]``, in frames.
            control: Which traversal acts: an int, one index per image, weights ``[B, K]`` or a `Schedule`.

        Returns:
            Latents ``[T, B, D]``.
        """
        when = times(t, z0)
        rates = z0.new_zeros(self.num_flows, z0.shape[-1])
        for k, (dimension, reach) in enumerate(self.traversals):
            rates[k, dimension] = reach / self.span
        return z0 + travelled(control, when, len(z0), self.num_flows) @ rates

    def transform(
        self, x0: Tensor, t: Tensor | Sequence[float], control: Control = 0, *, context: None = None
    ) -> Tensor:
        """Transforms images ``[B, C, H, W]`` along the traversals; arguments as `path`'s, frames ``[B, T, C, H, W]``.

        A context is refused: traversals know none.
        """
        refuse_beside(self, context=context)
        return self.decode(self.path(self.encode(x0).mean, t, control)).movedim(0, 1)


@dataclass(frozen=True)
class TraversalError(EquivarianceError):
    """Equivariance errors of the best single latent dimensions.

    Attributes:
        traversals: The dimension and range of each transformation.
    """

    traversals: tuple[Traversal, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {**super().as_dict(), "traversals": [list(traversal) for traversal in self.traversals]}


@torch.no_grad()
def best_traversal(
    model: Autoencodes,
    frames: Tensor,
    t: Any,
    k: int | Tensor = 0,
    *,
    ranges: Sequence[float] = _RANGES,
    batch_size: int = 1024,
) -> Traversal:
    r"""Searches the latent dimension and range that come nearest to a transformation.

    $$\arg\min_{d, r} \sum_x \sum_{t} \bigl| x_t - \mathrm{decode}\bigl(\mathrm{E}[z|x_0] + r \tau_t e_d \bigr) \bigr|_1,
      \qquad \tau_t = \frac{t - t_0}{t_T - t_0}$$

    as Song et al. (2023, section 4.1) do for models without a transformation. All dimensions are tried at all ranges
    on the last frame, and those that come nearest are then refined on all frames, by ever closer ranges. A range of 0
    takes part, so that the result is never worse than the reconstruction of the first frame.

    Args:
        model: A model with ``encode`` and ``decode``.
        frames: Training sequences ``[B, T+1, C, H, W]``, all of one transformation; a few dozen will do.
        t: Their times ``[T+1]``.
        k: The transformation of these sequences, an int or one index a sequence, all alike; it is only checked.
        ranges: Ranges to try, in standard deviations that a dimension has over the images.
        batch_size: Frames decoded at a time.

    Returns:
        The dimension and the range, which is in latent units.

    Raises:
        TypeError: If frames are no floats.
        ValueError: If a shape does not fit, ranges are missing or not finite, or several transformations are mixed.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8))
        >>> dimension, range_ = ff.metrics.best_traversal(model, torch.rand(3, 5, 1, 8, 8), torch.arange(5))
        >>> 0 <= dimension < 4
        True
    """
    frames, t = check_frames(frames, t, None)
    if len(t) < 2 or not len(frames):
        raise ValueError(f"frames must hold at least one sequence of two frames, got {list(frames.shape)}")
    if isinstance(k, Tensor) and k.numel() and not bool((k == k.flatten()[0]).all()):
        raise ValueError(f"all sequences must be of one transformation, got k in {k.unique().tolist()}: search each")
    tried = torch.as_tensor([float(r) for r in ranges], dtype=frames.dtype, device=frames.device)
    if not len(tried) or not bool(tried.isfinite().all()):
        raise ValueError(f"ranges must hold at least one finite number, got {list(ranges)}")
    with evaluating(model):
        z0 = model.encode(frames[:, 0]).mean
        # A dimension that holds one value for all images is given the unit of the prior.
        unit = z0.std(0, correction=0)
        unit = torch.where(unit > 1e-6, unit, 1.0)
        share = (t - t[0]) / (t[-1] - t[0])
        candidates = [(d, float(r * unit[d])) for d in range(code_of(model, z0).shape[1]) for r in tried]
        coarse = _errors(model, frames[:, -1:], z0, share[-1:], candidates, batch_size).view(-1, len(tried))
        best, where = coarse.min(1)
        finalists = best.argsort()[:_FINALISTS].tolist()
        found = [(d, float(tried[where[d]] * unit[d])) for d in finalists]
        step = float(tried.sort().values.diff().max()) if len(tried) > 1 else abs(float(tried[0]))
        for _ in range(_REFINEMENTS):
            step /= 2
            near = [(d, r + shift * step * float(unit[d])) for d, r in found for shift in (-1.0, 0.0, 1.0)]
            fine = _errors(model, frames, z0, share, near, batch_size).view(-1, 3)
            found = [near[3 * i + int(choice)] for i, choice in enumerate(fine.argmin(1))]
        found.append((finalists[0], 0.0))
        final = _errors(model, frames, z0, share, found, batch_size)
    return Traversal(*found[int(final.argmin())])


def _errors(
    model: Autoencodes,
    frames: Tensor,
    z0: Tensor,
    share: Tensor,
    candidates: Sequence[tuple[int, float]],
    batch_size: int,
) -> Tensor:
    """The L1 error [V] of each candidate (dimension, range) on frames [B, S, C, H, W] at shares [S] of the range."""
    images, steps = frames.shape[:2]
    at_once = max(batch_size // (images * steps), 1)
    errors = []
    for begin in range(0, len(candidates), at_once):
        part = candidates[begin : begin + at_once]
        shift = z0.new_zeros(len(part), z0.shape[1])
        for row, (dimension, reach) in enumerate(part):
            shift[row, dimension] = reach
        z = z0[None, :, None] + share[None, None, :, None] * shift[:, None, None]
        made = model.decode(z.flatten(0, 2)).view(len(part), *frames.shape)
        errors.append((made - frames).abs().flatten(1).sum(1))
    return torch.cat(errors) / images


def latent_traversal_error(
    model: Autoencodes,
    train: SequenceDataset,
    test: SequenceDataset,
    *,
    images: int = 64,
    ranges: Sequence[float] = _RANGES,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> TraversalError:
    r"""The equivariance error of a model without transformations: that of its best single latent dimensions.

    For each transformation the dimension and range are searched on training data (`best_traversal`), and E_k
    (`equivariance_error`) is measured with them on test data, as in Song et al. (2023, section 4.1).

    Args:
        model: A model with ``encode`` and ``decode``.
        train: The training split, to search on.
        test: The test split, to measure on.
        images: Number of training images to search on, per transformation, drawn at random.
        ranges: Ranges to try, in standard deviations that a dimension has over the images.
        limit: Draw so many test images at random, the same for every flow; None for all.
        seed: Seed of both draws.
        batch_size: Images per batch of the measurement.

    Returns:
        The errors, ``[K]``, and the traversals.

    Raises:
        ValueError: If the splits have different transformations or times, or there are no images.

    Example:
        >>> import torch, flowfactor as ff
        >>> data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8))
        >>> len(ff.metrics.latent_traversal_error(model, data, data).traversals)
        1
    """
    if train.num_flows != test.num_flows:
        raise ValueError(f"train has {train.num_flows} transformations and test {test.num_flows}")
    if train.t.shape != test.t.shape or not torch.equal(train.t.cpu(), test.t.cpu()):
        raise ValueError(f"train has times {train.t.tolist()} and test {test.t.tolist()}: ranges would not carry over")
    searched = []
    for k, batch in every_flow(train, images, images, seed):
        refuse_missing(batch, "latent_traversal_error")
        searched.append(best_traversal(model, batch["frames"], batch["t"], k, ranges=ranges))
    span = float((train.t[-1] - train.t[0]).abs())
    with evaluating(model):
        found = TraversalModel(model, searched, span)
        error = equivariance_error(found, test, limit=limit, seed=seed, batch_size=batch_size)
    return TraversalError(**vars(error), traversals=tuple(searched))
