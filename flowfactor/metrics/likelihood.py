"""Likelihood bounds of a model on data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowfactor import objectives
from flowfactor._evaluating import evaluating
from flowfactor.data import SequenceDataset
from flowfactor.latent_flow import LatentFlow
from flowfactor.metrics._checks import check_flows
from flowfactor.metrics.equivariance import every_flow, every_unlabelled
from flowfactor.metrics.estimates import mean_bounds
from flowfactor.metrics.estimates import standard_error as error_of_mean
from flowfactor.models.inputs import beside, shown
from flowfactor.models.protocols import BoundsLikelihood, SequenceModel, knows_transformations


@dataclass(frozen=True)
class LogLikelihood:
    """A bound of the log-likelihood with its uncertainty.

    Attributes:
        per_frame: The bound, in nats per frame: the sequence's divided by its number of frames, mean over sequences.
        standard_error: Standard error of the mean over sequences.
        by_flow: The bound of each transformation; none where the data have no labels.
        samples: Importance samples of each.
        likelihood: Name of p(x|z): ``"bernoulli"`` or ``"gaussian"``; bounds under different ones cannot be compared.
        objective: The bound that it tightens, such as ``"path"`` or ``"marginal"``; ``"paper-protocol"`` for
            `paper_log_likelihood`, which is none.
        count: Number of sequences.
        limit: The most sequences of each transformation that were to be drawn; None where all were taken.
        seed: Seed of that draw.

    The confidence interval `low` to `high` is the normal one of a mean over sequences, with 95% confidence. It treats
    sequences as independent: near-copies, as in a grid of factors, and one image under several transformations are not.
    """

    per_frame: float
    standard_error: float
    by_flow: list[float]
    samples: int
    likelihood: str
    objective: str
    count: int
    limit: int | None = None
    seed: int = 0

    @property
    def low(self) -> float:
        """Lower end of the 95% confidence interval."""
        return float(mean_bounds(torch.tensor(self.per_frame), torch.tensor(self.standard_error))[0])

    @property
    def high(self) -> float:
        """Upper end of the 95% confidence interval."""
        return float(mean_bounds(torch.tensor(self.per_frame), torch.tensor(self.standard_error))[1])

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {**asdict(self), "low": self.low, "high": self.high}


@torch.no_grad()
def log_likelihood(
    model: BoundsLikelihood,
    data: SequenceDataset,
    *,
    samples: int = 64,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    r"""The importance-weighted bound on data, in nats per frame.

    $\ln \frac1S \sum_s w_s$ with $w = p(x, z) / q(z)$ (Burda et al., ICLR 2016, eq. 8), a lower bound in expectation for
    every S that tightens as S grows. Log-determinants are taken with the exact divergence, whatever the model's flow is
    set to: noise of an estimate within the logarithm would raise the mean, and the value would be no bound. Where frames are
    missing, a sequence's bound is that of its observed frames, and divided by their number.

    Args:
        model: A model with ``log_likelihood(frames, t, k, samples)``.
        data: Sequences; take the test split. Where they have no labels, so has the bound: it is that of a model that
            infers k, or has no use for it.
        samples: S.
        limit: Draw so many images at random, the same for every transformation (recorded sequences: so many of each);
            None for all.
        seed: Seed of that draw.
        batch_size: Sequences per batch.
        generator: Source of the draws.

    Returns:
        The bound with its standard error.

    Raises:
        ValueError: If the model has other flows than the data set, or needs to know k and the data have no labels.

    Example:
        >>> import torch, flowfactor as ff
        >>> data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8))
        >>> ff.metrics.log_likelihood(model, data, samples=2).likelihood
        'bernoulli'
    """
    labelled = data.num_flows > 0
    if labelled:
        check_flows(model, data)
    batches = (every_flow if labelled else every_unlabelled)(data, limit, batch_size, seed)
    bounds: list[list[torch.Tensor]] = [[] for _ in range(max(data.num_flows, 1))]
    with evaluating(model), _exact_divergence(model):
        for k, batch in batches:
            control = batch["k"] if labelled else None
            also = beside(batch, "context", "mask")
            whole = model.log_likelihood(batch["frames"], batch["t"], control, samples, generator=generator, **also)
            count = batch["mask"].sum(1) if "mask" in also else batch["frames"].shape[1]
            bounds[k].append(whole / count)
    likelihood = getattr(getattr(model.decoder, "likelihood", None), "name", "custom")
    made = replace(_result(bounds, samples, likelihood, str(model.objective)), limit=limit, seed=seed)
    return made if labelled else replace(made, by_flow=[])


@contextmanager
def _exact_divergence(model: object) -> Iterator[None]:
    """Makes a model's flow take its divergence exactly for a while."""
    flow = getattr(model, "flow", None)
    if not isinstance(flow, LatentFlow):
        yield
        return
    divergence, flow.divergence = flow.divergence, "exact"
    try:
        yield
    finally:
        flow.divergence = divergence


def _result(values: list[list[Tensor]], samples: int, likelihood: str, objective: str) -> LogLikelihood:
    flat = [torch.cat(v) for v in values]
    every = torch.cat(flat)
    means = [float(v.mean()) for v in flat]
    error = float(error_of_mean(every))
    return LogLikelihood(float(every.mean()), error, means, samples, likelihood, objective, len(every))


@torch.no_grad()
def paper_log_likelihood(
    model: SequenceModel,
    data: SequenceDataset,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    r"""The "ln p(x_t)" by the protocol of Song et al. (2023): for comparison with their tables, and no likelihood.

    $$\frac1T \sum_{t=1}^{T} \ln N(x_t; \mathrm{decode}(z_t), I) + \ln q_t(z_t|x_0) - \ln p_t(z_t), \qquad
      z_t = \phi^k_t(z_0),\; z_0 \sim q(z_0|x_0)$$

    with one sample, and pixels of unit variance whatever the model's own likelihood is. The published figures can only
    come from this sign: the density ratio is *added*, where a lower bound subtracts it, so that the value grows with
    the divergence and can exceed what any unit-variance decoder reaches ($-\frac{D}{2} \ln 2\pi$ a frame of D values).
    Take `log_likelihood` for a bound.

    Densities here are exact, whatever divergence the model's flow is set to; the authors' code has a first-order form that
    is no determinant. A model without a transformation (``has_transformation`` is False) keeps $z_t = z_0$.

    Args:
        model: A model with ``encode``, ``decode``, ``prior`` and ``flow``, or without a transformation.
        data: Sequences; take the test split.
        limit: Draw so many images at random, the same for every transformation (recorded sequences: so many of each);
            None for all.
        seed: Seed of that draw.
        batch_size: Sequences per batch.
        generator: Source of the draws.

    Returns:
        The value, named ``"paper-protocol"`` in its ``objective``.

    Raises:
        TypeError: If the model has no flow with a density.
        ValueError: If the model has other flows than the data set, or room at rest: the ratio that the protocol adds would
            grow by all that a flow writes there.

    Example:
        >>> import torch, flowfactor as ff
        >>> data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8), augment_dim=0)
        >>> ff.metrics.paper_log_likelihood(model, data).objective
        'paper-protocol'
    """
    check_flows(model, data)
    flow, prior = getattr(model, "flow", None), getattr(model, "prior", None)
    still = not knows_transformations(model)
    if prior is None or (flow is None and not still):
        raise TypeError(f"a {type(model).__name__} has no flow and prior, whose densities the paper's protocol takes")
    if getattr(prior, "at_rest", None):
        raise ValueError(
            "the paper's protocol adds the density ratio, and in room at rest (augment_dim) that grows without end as a "
            "flow writes it: take log_likelihood, whose bound holds for such a model"
        )
    values: list[list[Tensor]] = [[] for _ in range(data.num_flows)]
    with evaluating(model), _exact_divergence(model):
        for k, batch in every_flow(data, limit, batch_size, seed):
            frames, t = shown(batch), batch["t"] if batch["t"].ndim == 1 else batch["t"].mT
            q = model.encode(frames[:, 0])
            z0 = objectives.draw(q, generator=generator)
            if still or flow is None:
                z, log_det = z0.expand(len(t), *z0.shape), z0.new_zeros(len(t), len(z0))
            else:
                path = flow(z0, t, k, log_det=True, generator=generator, **beside(batch, "context"))
                z, log_det = path.z, path.log_det
            log_q = q.log_prob(z0) - log_det
            log_p = torch.stack([prior.at(now, k).log_prob(at) for now, at in zip(t.to(z), z, strict=True)])
            miss = (frames.movedim(1, 0) - model.decode(z)).flatten(2)
            log_x = -0.5 * (miss.square().sum(2) + miss.shape[2] * math.log(2 * math.pi))
            value = (log_x + log_q - log_p)[1:]
            if "mask" not in batch:
                values[k].append(value.mean(0))
                continue
            mask = batch["mask"].mT[1:]
            values[k].append(torch.where(mask, value, 0).sum(0) / mask.sum(0).clamp(min=1))
    return replace(_result(values, 1, "gaussian", "paper-protocol"), limit=limit, seed=seed)
