"""How samples are shared out among flows before anything tells which flow is whose."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def balanced_responsibilities(
    losses: Tensor,
    tau: float | Tensor,
    prior: Tensor | None = None,
    *,
    balance: float = 1.0,
    iterations: int = 5,
) -> Tensor:
    r"""Shares out samples among flows by their losses, with marginals held near a prior: entropic optimal transport.

    Starts from $r_{ik} \propto p_k e^{-\ell_{ik} / \tau}$ and alternates two scalings in log space: of the flows, so that
    the average responsibility of flow k approaches $p_k$, and of the samples, so that each one's sum to 1 (Sinkhorn's
    iterations; Cuturi, NeurIPS 2013). With ``balance`` b < 1 the flows are scaled by the power b only: unbalanced
    transport, whose price for marginals off the prior is $\tau b / (1 - b)$ times their divergence (Chizat et al.,
    Mathematics of Computation 2018), so that the balance gives way as $\tau$ falls. At b = 0 it is Bayes' rule at
    temperature $\tau$.

    Args:
        losses: Losses of each sample under each flow ``[B, K]``, in nats.
        tau: Temperature in nats, positive.
        prior: Marginal of the flows ``[K]``, summing to 1; uniform where None.
        balance: b, from 0 (none) to 1 (exact).
        iterations: Number of iterations.

    Returns:
        Responsibilities ``[B, K]``, each row summing to 1, without gradient.

    Raises:
        ValueError: If a shape or a setting does not fit.

    Example:
        >>> import torch
        >>> losses = torch.tensor([[0.0, 1.0], [0.0, 2.0]])        # the first flow is better for both
        >>> balanced_responsibilities(losses, 0.1, iterations=100).argmax(-1).tolist()
        [1, 0]
        >>> balanced_responsibilities(losses, 0.1, balance=0.0).argmax(-1).tolist()
        [0, 0]
    """
    if losses.ndim != 2:
        raise ValueError(f"losses must have shape [B, K], got {list(losses.shape)}")
    if not float(tau) > 0:
        raise ValueError(f"tau must be positive, got {float(tau):g}")
    if not 0 <= balance <= 1:
        raise ValueError(f"balance must lie between 0 (none) and 1 (exact), got {balance!r}")
    batch, flows = losses.shape
    if prior is not None and prior.shape != (flows,):
        raise ValueError(f"prior must hold one probability a flow, shape [{flows}], got {list(prior.shape)}")
    losses = losses.detach()
    log_p = losses.new_full((flows,), -math.log(flows)) if prior is None else prior.to(losses).log()
    score = log_p - losses / tau
    potential = torch.zeros_like(log_p)
    log_r = score.log_softmax(-1)
    if balance > 0 and batch:
        for _ in range(iterations):
            marginal = log_r.logsumexp(0) - math.log(batch)
            # The fixed point of the damped step is b (log_p - log of the marginal without the potential).
            potential = balance * (potential + log_p - marginal)
            log_r = (score + potential).log_softmax(-1)
    return log_r.exp()


def anneal(ends: tuple[float, float], step: int, steps: int) -> float:
    """A temperature that falls geometrically from its start to its end.

    Example:
        >>> [round(anneal((1.0, 0.25), step, 10), 3) for step in (-5, 0, 5, 10, 99)]
        [1.0, 1.0, 0.5, 0.25, 0.25]
    """
    progress = 1.0 if steps == 0 else min(max(step / steps, 0.0), 1.0)
    return ends[0] ** (1 - progress) * ends[1] ** progress
