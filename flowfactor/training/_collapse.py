"""What a finished training may have come to that its loss does not show: codes or flows that tell nothing."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from flowfactor._evaluating import evaluating
from flowfactor.data import SequenceDataset
from flowfactor.models.inputs import shown
from flowfactor.models.protocols import InfersWeights, SequenceModel, infers_k

LEAST_STEPS = 200
"""A model that was trained for less is what it was made as, and its code tells nothing yet."""

_SEQUENCES = 128
_NATS = 0.05
_ON, _SHARE = 0.9, 0.99


@torch.no_grad()
def signs_of_collapse(model: SequenceModel, data: SequenceDataset, *, seed: int = 0) -> list[str]:
    r"""Looks at what a model infers from some training sequences.

    A code tells nothing where its information on the picture, $\frac12 \sum_d \ln(1 + Var_x[\mu_d] / E_x[\sigma_d^2])$ of a
    normal posterior, is below 0.05 nats; to tell two pictures apart takes 0.69. A flow is always on where it is inferred to
    act, with a probability above 0.9, in 99 of 100 pairs of frames or sequences, though others are there.

    Args:
        model: The model.
        data: The training split.
        seed: Seed of the choice of sequences.

    Returns:
        What is to be warned of, in sentences.
    """
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:_SEQUENCES]
    frames = shown(data.batch(rows))
    if len(frames) < 2:
        return []
    first = next(model.parameters())
    frames = frames.to(first.device, first.dtype)
    with evaluating(model):
        return [*_code(model, frames[:, 0]), *_flows(model, frames)]


def warn_of_collapse(model: SequenceModel, data: SequenceDataset, *, seed: int = 0) -> list[str]:
    """Warns of what `signs_of_collapse` finds, which it gives."""
    found = signs_of_collapse(model, data, seed=seed)
    for line in found:
        warnings.warn(line, stacklevel=3)
    return found


def _code(model: SequenceModel, pictures: Tensor) -> list[str]:
    q = model.encode(pictures)
    try:
        mean, variance = q.mean.float(), q.variance.float()
    except (AttributeError, NotImplementedError):  # an encoder of the user's own need not have them
        return []
    information = float((mean.var(0) / variance.mean(0).clamp(min=1e-12)).log1p().sum()) / 2
    if information >= _NATS:
        return []
    return [
        f"the posterior has collapsed: the code z_0 is the same for every picture (it tells {information:.2g} nats of "
        "them), so that the decoder draws one picture for all. Train longer, lower the learning rate, or give the "
        "divergence less weight (model.kl_weight, or model.beta)"
    ]


def _flows(model: SequenceModel, frames: Tensor) -> list[str]:
    if not infers_k(model) or getattr(model, "warming_up", False):
        return []
    if isinstance(model, InfersWeights):
        probs, of = model.infer_weights(frames).spike_probs.flatten(0, -2), "pairs of frames"
    else:
        probs, of = model.infer_factor(frames).probs, "sequences"
    if probs.shape[-1] < 2:
        return []
    share = (probs > _ON).float().mean(0)
    return [
        f"flow {k} is always on: it is inferred to act in {share[k]:.0%} of the {of}, with a mean probability of "
        f"{probs[:, k].mean():.3f}, so that it tells no transformations apart. Warm up longer (model.warmup_steps, or the "
        "estimator's anneal_steps), hotter (warmup_temperature, tau), or train with another seed"
        for k in (share >= _SHARE).nonzero().flatten().tolist()
    ]
