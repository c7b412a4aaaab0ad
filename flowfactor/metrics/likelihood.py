"""Likelihood bounds of a model on data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from flowfactor.data import SequenceDataset
from flowfactor.metrics.equivariance import evaluating, every_flow


@dataclass(frozen=True)
class LogLikelihood:
    """A bound of the log-likelihood with its uncertainty.

    Attributes:
        per_frame: The bound, in nats per frame: the sequence's divided by its number of frames, mean over sequences.
        standard_error: Standard error of the mean over sequences.
        by_flow: The bound of each transformation.
        samples: Importance samples behind each.
        likelihood: Name of p(x|z): ``"bernoulli"`` or ``"gaussian"``; bounds under different ones cannot be compared.
        objective: The bound that it tightens, ``"path"`` or ``"marginal"``.
        count: Number of sequences.
    """

    per_frame: float
    standard_error: float
    by_flow: list[float]
    samples: int
    likelihood: str
    objective: str
    count: int

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return asdict(self)


@torch.no_grad()
def log_likelihood(
    model: Any,
    data: SequenceDataset,
    *,
    samples: int = 64,
    limit: int | None = None,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    r"""The importance-weighted bound on data, in nats per frame.

    $\ln \frac1S \sum_s w_s$ with $w = p(x, z) / q(z)$ (Burda et al., ICLR 2016, eq. 8), a lower bound in expectation for
    every S that tightens as S grows.

    Args:
        model: A model with ``log_likelihood(frames, t, k, samples)``.
        data: Sequences; take the test split.
        samples: S.
        limit: Use the first so many images per transformation only; None for all.
        batch_size: Sequences per batch.
        generator: Source of the draws.

    Returns:
        The bound with its standard error.

    Raises:
        ValueError: If the model has other flows than the data set.

    Example:
        >>> import torch, flowfactor as ff
        >>> data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8))
        >>> ff.metrics.log_likelihood(model, data, samples=2).likelihood
        'bernoulli'
    """
    if model.num_flows != data.num_flows:
        raise ValueError(f"the model has {model.num_flows} flows and the data set {data.num_flows} transformations")
    bounds: list[list[torch.Tensor]] = [[] for _ in range(data.num_flows)]
    with evaluating(model):
        for k, batch in every_flow(data, limit, batch_size):
            whole = model.log_likelihood(batch["frames"], batch["t"], batch["k"], samples, generator=generator)
            bounds[k].append(whole / batch["frames"].shape[1])
    flat = [torch.cat(b) for b in bounds]
    every = torch.cat(flat)
    likelihood = getattr(getattr(model.decoder, "likelihood", None), "name", "custom")
    error = float(every.std() / len(every) ** 0.5) if len(every) > 1 else float("nan")
    means = [float(b.mean()) for b in flat]
    return LogLikelihood(float(every.mean()), error, means, samples, likelihood, model.objective, len(every))
