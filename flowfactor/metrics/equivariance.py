"""How exactly a model's latent flows do what the true transformations do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowfactor._evaluating import evaluating
from flowfactor.control import Control
from flowfactor.data import SequenceDataset
from flowfactor.data.starts import Direction, Start
from flowfactor.metrics._checks import check_flows, running_as
from flowfactor.metrics.draw import draw_elements
from flowfactor.metrics.estimates import MeanInterval
from flowfactor.metrics.estimates import standard_error as error_of_mean
from flowfactor.models.inputs import beside, blanked, shown
from flowfactor.models.protocols import MovesCodes, Transforms, code_of


@dataclass(frozen=True)
class EquivarianceError(MeanInterval):
    """Equivariance errors E_k with their uncertainty.

    Attributes:
        mean: E_k, ``[K]``: summed over frames 1..T, pixels and channels; mean over images.
        standard_error: Standard error of the mean over images, ``[K]``.
        doing_nothing: The same error of leaving the true x_0 as it is, ``[K]``.
        count: Number of images that each is based on; the smallest, where recorded sequences are not as many of each.
        flow_names: Names of the flows, where the data set has them.
        limit: The most images that were to be drawn; None where all were taken.
        seed: Seed of that draw.

    The confidence intervals `low` to `high` are the normal ones of a mean (for `latent_equivariance_error`, of a ratio
    of means), with 95% confidence. They treat the images as independent: where many are near-copies of each other, as in
    a grid of factors, they say how well the images drawn stand for this data set, and not for other scenes.
    """

    mean: Tensor
    standard_error: Tensor
    doing_nothing: Tensor
    count: int
    flow_names: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "flows": list(self.flow_names),
            "mean": self.mean.tolist(),
            "standard_error": self.standard_error.tolist(),
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "doing_nothing": self.doing_nothing.tolist(),
            "count": self.count,
            "limit": self.limit,
            "seed": self.seed,
        }


@torch.no_grad()
def equivariance_error(
    model: Transforms,
    data: SequenceDataset,
    *,
    start: Start | None = None,
    direction: Direction | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> EquivarianceError:
    r"""The equivariance error of every flow (Song et al. 2023, section 4.1).

    $$E_k = \frac1N \sum_x \sum_{t=1}^{T} \bigl| x_t - \mathrm{decode}(z_t) \bigr|_1, \qquad
      z_t = \phi^k_t(\mathrm{E}[z | x_0])$$

    with the L1 norm over all pixels and channels, over all T transformed frames, from the mean of the posterior. Every
    image meets every transformation. Frames that the data's ``mask`` says are missing are left out of the sums; times and
    contexts of the sequences' own are handed to the model.

    Args:
        model: The model, with ``transform`` and ``num_flows``.
        data: Sequences of true transformations; take the test split.
        start: Where sequences begin: ``"first"`` or ``"any"``, for data that can begin anywhere (`TransformedImages` and its
            kin, `CombinedImages`); None as they do.
        direction: ``"forward"``, or ``"backward"``: the flow runs back from the encoded last frame, at times that fall; None
            as the data do, those that run both ways forward.
        limit: Draw so many images at random, the same for every flow (recorded sequences: so many of each); None for all.
        seed: Seed of that draw.
        batch_size: Images per batch.

    Returns:
        The errors, ``[K]``, in units of pixel values summed over a sequence.

    Raises:
        ValueError: If the model has other flows than the data set, there are no images, or the data cannot begin so.

    Example:
        >>> import torch, flowfactor as ff
        >>> data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8))
        >>> ff.metrics.equivariance_error(model, data).mean.shape
        torch.Size([1])
        >>> ff.metrics.equivariance_error(model, data, start="any", direction="backward").count
        4
    """
    data = running_as(data, start, direction, "equivariance_error")
    check_flows(model, data)
    errors: list[list[Tensor]] = [[] for _ in range(data.num_flows)]
    resting: list[list[Tensor]] = [[] for _ in range(data.num_flows)]
    with evaluating(model):
        for k, batch in every_flow(data, limit, batch_size, seed):
            frames = batch["frames"]
            made = model.transform(frames[:, 0], batch["t"], batch["k"], **beside(batch, "context"))
            errors[k].append(summed(frames[:, 1:] - made[:, 1:], batch))
            resting[k].append(summed(frames[:, 1:] - frames[:, :1], batch))
    per_image = [torch.cat(e) for e in errors]
    return EquivarianceError(
        torch.stack([error.mean() for error in per_image]),
        torch.stack([error_of_mean(error) for error in per_image]),
        torch.stack([torch.cat(r).mean() for r in resting]),
        min(map(len, per_image)),
        tuple(getattr(data, "flow_names", ())),
        limit,
        seed,
    )


@torch.no_grad()
def latent_equivariance_error(
    model: MovesCodes, data: SequenceDataset, *, limit: int | None = None, seed: int = 0, batch_size: int = 256
) -> EquivarianceError:
    r"""The equivariance error of every flow in latent space: whether encoding and transforming commute.

    $$L_k = \frac{\sum_x \sum_{t=1}^{T} | \mathrm{E}[z|x_t] - z_t |_2}{\sum_x \sum_{t=1}^{T} | \mathrm{E}[z|x_t] -
      \mathrm{E}[z|x_0] |_2}, \qquad z_t = \phi^k_t(\mathrm{E}[z|x_0])$$

    The latent counterpart of `equivariance_error`. The denominator is how far the codes of the true frames move, so that
    neither the scale nor the size of the latent space matters: 0 is exact, and leaving the code as it is scores 1. It
    says nothing about the decoder: read it with the error in pixel space. Dimensions at rest, which no encoder writes, are
    left out of both norms. It asks the encoder for transformed frames:
    one that was trained on first frames alone, as that of `FlowFactorizedVAE` is without ``code_weight``, may miss them by
    more than 1 where the decoded frames are good. The standard error is that of a ratio of means (the delta method).

    Args:
        model: The model, with ``encode``, ``num_flows`` and latent paths (``flow``, or ``path(z0, t, control)``).
        data: Sequences of true transformations; take the test split.
        limit: Draw so many images at random, the same for every flow (recorded sequences: so many of each); None for all.
        seed: Seed of that draw.
        batch_size: Images per batch.

    Returns:
        The errors, ``[K]``, relative to doing nothing.

    Raises:
        NoLatentFlowError: If the model has no latent flow.
        ValueError: If the model has other flows than the data set, there are no images, or the codes of the true frames
            of a transformation do not move at all.

    Example:
        >>> import torch, flowfactor as ff
        >>> data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8))
        >>> ff.metrics.latent_equivariance_error(model, data).doing_nothing
        tensor([1.])
    """
    check_flows(model, data)
    missed: list[list[Tensor]] = [[] for _ in range(data.num_flows)]
    moved: list[list[Tensor]] = [[] for _ in range(data.num_flows)]
    with evaluating(model):
        for k, batch in every_flow(data, limit, batch_size, seed):
            latents = model.encode(shown(batch).movedim(1, 0)).mean
            t = batch["t"] if batch["t"].ndim == 1 else batch["t"].mT
            path = latent_path(model, latents[0], t, batch["k"], **beside(batch, "context"))
            codes, path = code_of(model, latents), code_of(model, path)
            missed[k].append(_observed((codes[1:] - path[1:]).norm(dim=-1).mT, batch).sum(1))
            moved[k].append(_observed((codes[1:] - codes[0]).norm(dim=-1).mT, batch).sum(1))
    each = [(torch.cat(miss), torch.cat(move)) for miss, move in zip(missed, moved, strict=True)]
    way = torch.stack([move.mean() for _, move in each])
    if not bool((way > 0).all()):
        still = (way == 0).nonzero().flatten().tolist()
        raise ValueError(f"the codes of the true frames of flows {still} do not move: there is nothing to compare with")
    ratio = torch.stack([miss.mean() for miss, _ in each]) / way
    off = [error_of_mean(miss - share * move) for share, (miss, move) in zip(ratio, each, strict=True)]
    error, count = torch.stack(off) / way, min(len(miss) for miss, _ in each)
    names = tuple(getattr(data, "flow_names", ()))
    return EquivarianceError(ratio, error, torch.ones_like(ratio), count, names, limit, seed)


class NoLatentFlowError(TypeError):
    """A model has no latent flow to measure.

    Example:
        >>> import torch, flowfactor as ff
        >>> ff.metrics.MatchedModel(object(), torch.tensor([0])).path(torch.zeros(1, 4), [0.0, 1.0])
        Traceback (most recent call last):
        ...
        flowfactor.metrics.equivariance.NoLatentFlowError: a object has no latent flow: it needs flow(z0, t, control), ...
    """


def summed(difference: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """L1 norms ``[B]`` of differences of frames after the first ``[B, T, C, H, W]``, of those that were observed."""
    return _observed(difference.abs(), batch).flatten(1).sum(1)


def _observed(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Values ``[B, T, ...]`` of frames after the first, 0 where the frame is missing."""
    mask = batch.get("mask")
    return values if mask is None else blanked(values, mask[:, 1:])


def latent_path(model: object, z0: Tensor, t: Tensor, control: Control, **named: Any) -> Tensor:
    """Latents ``[T, B, D]`` along a model's transformation, from ``z0 [B, D]``; NoLatentFlowError where it has none."""
    path: Callable[..., Tensor] | None = getattr(model, "path", None)
    if callable(path):
        return path(z0, t, control, **named)
    flow = getattr(model, "flow", None)
    if flow is None:
        raise NoLatentFlowError(
            f"a {type(model).__name__} has no latent flow: it needs flow(z0, t, control), a flowfactor.LatentFlow, or "
            "path(z0, t, control). Where a latent dimension stands in for a transformation, see TraversalModel"
        )
    return flow(z0, t, control, **named).z


def every_flow(
    data: SequenceDataset, limit: int | None, batch_size: int, seed: int = 0
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Batches of every image under every transformation, or of so many drawn; raises ValueError where there are none."""
    fixed = data.fixed_k
    for k in range(data.num_flows):
        # Recorded sequences carry their transformation; images meet each one.
        own = torch.arange(len(data)) if fixed is None else (fixed == k).nonzero().squeeze(-1)
        own = own[draw_elements(len(own), limit, seed)]
        if not len(own):
            raise ValueError(f"the data set has no sequence of flow {k}")
        for chosen in own.split(batch_size):
            yield k, data.batch(chosen, torch.full((len(chosen),), k))


def every_unlabelled(
    data: SequenceDataset, limit: int | None, batch_size: int, seed: int = 0
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Batches of sequences without labels, drawn at random where they are limited; they come with 0 for want of a flow."""
    for chosen in draw_elements(len(data), limit, seed).split(batch_size):
        yield 0, data.batch(chosen)
