"""Which learned flow does what: matches the flows of a weakly supervised model to true transformations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from flowfactor._evaluating import evaluating
from flowfactor.control import Control, Schedule
from flowfactor.data import SequenceDataset
from flowfactor.data.mixing import CombinedSequences
from flowfactor.metrics._checks import check_flows
from flowfactor.metrics.draw import draw_elements
from flowfactor.metrics.equivariance import every_flow, latent_path
from flowfactor.metrics.matching import FactorAccuracy, SpikeMetrics, factor_accuracy, spike_metrics
from flowfactor.models.inputs import refuse_missing, shown
from flowfactor.models.protocols import InfersFactor, InfersWeights, SequenceModel, infers_k


@torch.no_grad()
def match_flows(
    model: InfersFactor,
    data: SequenceDataset,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    order: Tensor | None = None,
) -> FactorAccuracy:
    """Infers the factor of every sequence of a data set, and matches the flows of a model to its transformations.

    Args:
        model: A model with ``infer_factor``.
        data: Sequences of known transformations; take the test split.
        limit: Draw so many sequences of each transformation at random; None for all.
        seed: Seed of that draw.
        batch_size: Sequences per batch.
        order: The model's flow of each transformation, ``[K]``, where it is known already; its accuracy is then measured.

    Returns:
        The matching and its accuracy.

    Raises:
        ValueError: If the model has other flows than the data set.
    """
    check_flows(model, data)
    predicted, true = [], []
    with evaluating(model):
        for k, batch in every_flow(data, limit, batch_size, seed):
            predicted.append(model.infer_factor(shown(batch)).probs.argmax(-1))
            true.append(torch.full((len(batch["frames"]),), k))
    found = factor_accuracy(torch.cat(predicted), torch.cat(true), data.num_flows, order=order)
    return replace(found, limit=limit, seed=seed)


@torch.no_grad()
def match_spikes(
    model: InfersWeights,
    data: SequenceDataset,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    order: Tensor | None = None,
    threshold: float = 0.5,
) -> SpikeMetrics:
    """Infers which flows act between all frames of a data set, and compares them with what does.

    Args:
        model: A model with ``infer_weights``, such as a `flowfactor.models.SparseTransformationVAE`.
        data: Sequences whose ``weights`` are known, such as `flowfactor.data.CombinedImages`; or of one known
            transformation each, which then acts from the first frame to the last.
        limit: Draw so many sequences at random, of each transformation where these are apart; None for all.
        seed: Seed of that draw.
        batch_size: Sequences per batch.
        order: The model's flow of each transformation, ``[K]``, where it is known already.
        threshold: A flow is inferred to act where its spike probability is above.

    Returns:
        Precision and recall of the spikes.

    Raises:
        ValueError: If the model has other flows than the data set.
    """
    check_flows(model, data)
    found, true = [], []
    with evaluating(model):
        for active, frames in _known_activity(data, limit, batch_size, seed):
            found.append((model.infer_weights(frames).spike_probs > threshold).cpu())
            true.append(active.cpu())
    return replace(spike_metrics(torch.cat(found), torch.cat(true), order=order), limit=limit, seed=seed)


def _known_activity(
    data: SequenceDataset, limit: int | None, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """What acts between the frames of sequences, [B, T, K], and these frames."""
    if isinstance(data, CombinedSequences):
        for rows in draw_elements(len(data), limit, seed).split(batch_size):
            batch = data.batch(rows)
            yield batch["weights"] > 0, batch["frames"]
        return
    for k, batch in every_flow(data, limit, batch_size, seed):
        refuse_missing(batch, "match_spikes")
        active = torch.zeros(len(batch["frames"]), data.num_steps, data.num_flows, dtype=torch.bool)
        active[..., k] = True
        yield active, batch["frames"]


def flow_names(model: InfersFactor, data: SequenceDataset, limit: int | None = 200, seed: int = 0) -> tuple[str, ...]:
    """Names the flows of a model by what they do: those of the data set, in the order that the model has them.

    Args:
        model: The model.
        data: Sequences of known transformations.
        limit: Sequences of each transformation, drawn at random, to match by, where the model found the flows itself;
            None for all.
        seed: Seed of that draw.

    Returns:
        The names, ``[K]``; numbers, where the data have no labels.
    """
    if not data.num_flows:
        return tuple(f"flow {k}" for k in range(model.num_flows))
    if not infers_k(model):
        return data.flow_names
    order = match_flows(model, data, limit=limit, seed=seed).order
    return tuple(data.flow_names[k] for k in order.argsort().tolist())


class MatchedModel:
    """A model seen with its flows in another order: flow k is the one that `FactorAccuracy.order` gives for k.

    Everything but `transform`, `path` and `log_likelihood` is the model's own. Its ``flow`` takes the control
    that `own_control` gives.

    Args:
        model: The model.
        order: The model's flow of each k, ``[K]``.

    Example:
        >>> import torch, flowfactor as ff
        >>> images = torch.rand(6, 1, 8, 8)
        >>> turns = {"left": (ff.data.Rotate(), 0, 80), "right": (ff.data.Rotate(), 0, -80)}
        >>> data = ff.data.TransformedImages(images, turns, steps=4)
        >>> model = ff.models.build_vae((1, 8, 8), 2, 4, hidden=(8, 8), supervision="weak", num_frames=5)
        >>> found = ff.metrics.match_flows(model, data)
        >>> matched = ff.metrics.MatchedModel(model, found.order)
        >>> ff.metrics.equivariance_error(matched, data).mean.shape       # of "left" and of "right", whatever k they got
        torch.Size([2])
    """

    num_flows: int  # these are looked up in the model
    objective: object
    decoder: nn.Module

    def __init__(self, model: SequenceModel, order: Tensor) -> None:
        self.model, self.order = model, order

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "order") or name.startswith("__"):  # a copy has none of them before it is filled
            raise AttributeError(name)
        return getattr(self.model, name)

    def own_control(self, control: Control) -> Control:
        """The model's control for one of this order."""
        if isinstance(control, Schedule):
            pieces = zip(control.moments, control.controls, strict=True)
            return Schedule([(start, self.own_control(piece)) for start, piece in pieces])  # type: ignore[misc]
        if not isinstance(control, Tensor):
            return int(self.order[control])
        if control.is_floating_point():
            return control[..., self.order.argsort().to(control.device)]
        return self.order.to(control.device)[control]

    def encode(self, x: Tensor) -> Distribution:
        """The model's posterior of frames ``[*batch, C, H, W]``."""
        return self.model.encode(x)

    def path(self, z0: Tensor, t: Any, control: Control = 0, **named: Any) -> Tensor:
        """Carries latents ``[B, D]`` along the flows in this order: ``[T, B, D]``."""
        return latent_path(self.model, z0, t, self.own_control(control), **named)

    def transform(self, x0: Tensor, t: Any, control: Control = 0, **named: Any) -> Tensor:
        """Transforms images by the flows in this order, as the model's own ``transform`` does."""
        return self.model.transform(x0, t, self.own_control(control), **named)

    def log_likelihood(self, frames: Tensor, t: Tensor, k: Control | None, *arguments: Any, **named: Any) -> Tensor:
        """Bounds the likelihood under the flows in this order, as the model's own ``log_likelihood`` does."""
        return self.model.log_likelihood(frames, t, None if k is None else self.own_control(k), *arguments, **named)
