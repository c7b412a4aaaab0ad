r"""Training objectives: lower bounds of log-likelihoods, each true and each named.

``path``: the flow is the generative transition, $z_t = \phi_t(z_0)$, so that a sequence has one latent $z_0$:
$$\ln p(x_{0..T}|k) \ge E_{q(z_0|x_0)} \sum_t \ln p(x_t|z_t) - KL[q(z_0|x_0) \,|\, p(z_0)] .$$
``marginal``: every frame has a latent of its own, with the prior path $p_t$ (the ELBO of Song et al. 2023, eq. 9, with
exact densities and the divergence's right sign):
$$\sum_t \ln p_t(x_t|k) \ge \sum_t E_{q_t}\bigl[\ln p(x_t|z_t) - \ln q_t(z_t) + \ln p_t(z_t)\bigr], \qquad
  \ln q_t(z_t) = \ln q_0(z_0) - \int_0^t \nabla\cdot v\,ds .$$
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from flowfactor.control import Control, Schedule
from flowfactor.path import FlowPath
from flowfactor.priors import Prior

OBJECTIVES = ("path", "marginal")


def draw(q: Distribution, samples: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Tensor:
    """Draws from a posterior with gradients; independent normals honour ``generator``.

    Args:
        q: Distribution of vectors.
        samples: Leading sample shape.
        generator: Source of the draw (other distributions than independent normals use the global one).

    Returns:
        Samples ``[*samples, *batch, D]``.
    """
    if isinstance(q, Independent) and isinstance(q.base_dist, Normal):
        mean, scale = q.base_dist.loc, q.base_dist.scale
        noise = torch.randn((*samples, *mean.shape), generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + scale * noise
    return q.rsample(torch.Size(samples))


def start_divergence(q: Distribution, prior: Prior, z0: Tensor, control: Control) -> Tensor:
    """KL[q(z_0|x_0) | p(z_0)], in closed form where there is one, else its one-sample estimate at ``z0``.

    Args:
        q: Posterior, batch ``[B]``.
        prior: Prior path; its start counts.
        z0: The sample ``[B, D]``.
        control: Which flow acts.

    Returns:
        Divergences ``[B]``, in nats.
    """
    p = prior.at(0.0, control)
    try:
        return kl_divergence(q, p).expand(q.batch_shape)
    except NotImplementedError:
        return q.log_prob(z0) - p.log_prob(z0)


def path_log_ratio(q: Distribution, prior: Prior, path: FlowPath, control: Control) -> Tensor:
    """Ln q(z_0|x_0) - ln p(z_0) of the samples a path starts with, ``[*samples, B]``, in nats."""
    return q.log_prob(path.z[0]) - prior.at(0.0, control).log_prob(path.z[0])


def marginal_log_ratio(q: Distribution | Tensor, prior: Prior, path: FlowPath, t: Tensor, control: Control) -> Tensor:
    """Ln q_t(z_t) - ln p_t(z_t) along a path, in nats.

    Args:
        q: Posterior of z_0, batch ``[B]``, or its log-density where the path starts, ``[*samples, B]``.
        prior: Prior path p_t.
        path: Path with log-determinant, ``z [T, *samples, B, D]``.
        t: Times ``[T]``.
        control: Which flow acts.

    Returns:
        Log-ratios ``[T, *samples, B]``.
    """
    assert path.log_det is not None
    log_q = (q if isinstance(q, Tensor) else q.log_prob(path.z[0])) - path.log_det
    batch = path.z.shape[1:-1]
    if isinstance(control, Tensor) and not isinstance(control, Schedule):
        lead = path.z.shape[:-1]
        control = control.expand(lead if not control.is_floating_point() else (*lead, control.shape[-1]))
    times = t.to(path.z).reshape(-1, *[1] * len(batch)).expand(path.z.shape[:-1])
    return log_q - prior.at(times, control).log_prob(path.z)


def choose_frames(
    total: int, wanted: int | None, batch: int, device: torch.device, generator: torch.Generator | None = None
) -> tuple[Tensor, float]:
    """Chooses which frames of each sequence to decode, spread over its length, without bias.

    One frame is drawn from each of ``wanted`` equal stretches, so that every frame is as likely as any other; the sum
    over the chosen, times the weight, is an unbiased estimate of the sum over all.

    Args:
        total: Number of frames.
        wanted: How many to choose; None for all.
        batch: B.
        device: Where the indices go.
        generator: Source of the draw.

    Returns:
        Frame indices ``[wanted, B]``, and the weight ``total / wanted``.

    Example:
        >>> index, weight = choose_frames(9, 3, 4, torch.device("cpu"))
        >>> index.shape, weight
        (torch.Size([3, 4]), 3.0)
    """
    if wanted is None or wanted >= total:
        return torch.arange(total, device=device).unsqueeze(-1).expand(total, batch), 1.0
    offsets = torch.rand(wanted, batch, generator=generator, device=device)
    stretch = total / wanted
    position = (torch.arange(wanted, device=device).unsqueeze(-1) + offsets) * stretch
    return position.long().clamp_(max=total - 1), stretch


def sequence_log_likelihood(
    decoder: Callable[[Tensor], Distribution],
    frames: Tensor,
    z: Tensor,
    wanted: int | None = None,
    generator: torch.Generator | None = None,
    row: Tensor | None = None,
) -> Tensor:
    r"""$\sum_t \ln p(x_t|z_t)$ of each path, or an unbiased estimate from a few of its frames.

    Args:
        decoder: Maps latents ``[*batch, D]`` to a distribution of frames.
        frames: Sequences ``[B, T+1, C, H, W]``.
        z: Latents of N paths ``[T+1, N, D]``.
        wanted: How many frames of each path to decode, as in `choose_frames`; None for all.
        generator: Source of the draw.
        row: The sequence that each path belongs to ``[N]``; None where path n is that of sequence n. All paths of a
            sequence are judged by the same frames.

    Returns:
        Log-likelihoods ``[N]``, in nats.

    Example:
        >>> import flowfactor as ff
        >>> decoder, frames = ff.encoders.ConvDecoder(4, 1, 8), torch.rand(6, 5, 1, 8, 8)
        >>> twice = torch.arange(6).repeat(2)                        # two paths for each of six sequences
        >>> sequence_log_likelihood(decoder, frames, torch.randn(5, 12, 4), wanted=2, row=twice).shape
        torch.Size([12])
    """
    batch, total = frames.shape[:2]
    index, weight = choose_frames(total, wanted, batch, frames.device, generator)
    path = torch.arange(z.shape[1], device=z.device)
    row = path if row is None else row
    index = index[:, row]
    return weight * decoder(z[index, path]).log_prob(frames[row, index]).sum(0)


def chunks(samples: int, chunk: int) -> Sequence[int]:
    """Splits a number of samples into portions of at most ``chunk``."""
    return [min(chunk, samples - begin) for begin in range(0, samples, chunk)]


def log_mean_exp(log_weights: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of exp over the first dimension of tensors that are laid end to end there."""
    joined = torch.cat(list(log_weights))
    return torch.logsumexp(joined, 0) - math.log(len(joined))
