r"""Training objectives: lower bounds of log-likelihoods, each true and each named.

`PathBound`: the flow is the generative transition, $z_t = \phi_t(z_0)$, so that a sequence has one latent $z_0$:
$$\ln p(x_{0..T}|k) \ge E_{q(z_0|x_0)} \sum_t \ln p(x_t|z_t) - KL[q(z_0|x_0) \,|\, p(z_0)] .$$
`MarginalBound`: every frame has a latent of its own, with the prior path $p_t$ (the ELBO of Song et al. 2023, eq. 9, with
exact densities and the divergence's right sign):
$$\sum_t \ln p_t(x_t|k) \ge \sum_t E_{q_t}\bigl[\ln p(x_t|z_t) - \ln q_t(z_t) + \ln p_t(z_t)\bigr], \qquad
  \ln q_t(z_t) = \ln q_0(z_0) - \int_0^t \nabla\cdot v\,ds .$$
Settings name them ``"path"`` and ``"marginal"``. An `Objective` of one's own is a class of one method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from flowfactor._config import Named
from flowfactor.control import Control, Schedule
from flowfactor.path import FlowPath
from flowfactor.priors import Prior
from flowfactor.registry import BUILT_IN, declare

OBJECTIVES = BUILT_IN["objective"]


class NoImportanceWeightsError(ValueError):
    """An objective has no importance weights, so that nothing tightens its bound.

    Example:
        >>> import torch, flowfactor as ff
        >>> class Mine(ff.objectives.Objective): ...
        >>> model = ff.models.build_vae((1, 8, 8), 2, 4, hidden=(8, 8), objective=Mine())
        >>> model.log_likelihood(torch.rand(2, 3, 1, 8, 8), torch.arange(3), 0)
        Traceback (most recent call last):
        ...
        flowfactor.objectives.NoImportanceWeightsError: the objective Mine has no importance weights, ...
    """


class Objective(Named):
    r"""Base of the bounds that a `flowfactor.models.FlowFactorizedVAE` is trained by.

    The model draws $z_0$ from $q(z_0|x_0)$, carries it along a flow, and maximises $E \sum_t \ln p(x_t|z_t)$ less a
    divergence of the latents from the prior. That divergence makes the bound: a subclass gives it by `divergence`, and may
    give the other methods too. Constructor arguments are remembered; `flowfactor.register_objective` gives it a name.

    Attributes:
        log_det: Whether `divergence` looks at the path's log-determinants, which a solve has to be asked for.
        any_reference: Whether the bound holds whichever frame is encoded, so that ``path.z[path.start]`` is the draw, as
            ``FlowFactorizedVAE(reference="random")`` needs. Not so where ``path.z[0]`` is taken for it.

    Example:
        >>> import torch, flowfactor as ff
        >>> class Tempered(ff.objectives.Objective):
        ...     def __init__(self, power: float = 0.5) -> None:
        ...         self.power = power
        ...     def divergence(self, start, prior, path, t, control):
        ...         return self.power * (start - prior.at(0.0, control).log_prob(path.z[0]))
        >>> model = ff.models.build_vae((1, 8, 8), 2, 4, hidden=(8, 8), objective=Tempered(0.1))
        >>> model(torch.rand(6, 5, 1, 8, 8), torch.arange(5), 0).kl.shape
        torch.Size([])
    """

    kind_of_part = "objective"
    log_det: ClassVar[bool] = False
    any_reference: ClassVar[bool] = False

    def __init__(self) -> None:
        pass

    def begin(self, q: Distribution, prior: Prior, z0: Tensor, control: Control) -> Tensor:
        """What all flows of a sequence share, worked out once: ln q(z_0|x_0) of the draw, unless a subclass says otherwise.

        Args:
            q: Posterior of z_0, batch ``[B]``.
            prior: Prior path.
            z0: The draw ``[B, D]``.
            control: Which flow acts; an int where all are tried.

        Returns:
            A number of each sequence ``[B]``.
        """
        return q.log_prob(z0)

    def divergence(
        self, start: Tensor, prior: Prior, path: FlowPath, t: Tensor, control: Control, mask: Tensor | None = None
    ) -> Tensor:
        """The divergence of a path's latents from the prior: the one method that a subclass has to give.

        Args:
            start: What `begin` gave, of the sequence that each path belongs to, ``[N]``.
            prior: Prior path.
            path: The paths, ``z [T+1, N, D]``; with their log-determinants if `log_det` says so.
            t: Times ``[T+1]``, in frames; ``[T+1, N]`` where each path has its own.
            control: Which flow acts on each path.
            mask: Which frames were observed ``[T+1, N]``, handed over where some were not. A subclass that takes no such
                argument is for sequences without missing frames.

        Returns:
            Divergences ``[N]``, or estimates of them, in nats.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define divergence(start, prior, path, t, control) -> [N]"
        )

    def log_weights(
        self, log_p: Tensor, q: Distribution, prior: Prior, path: FlowPath, t: Tensor, control: Control,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logarithms of importance weights p(x, z) / q(z), by which more samples tighten the bound.

        Args:
            log_p: ln p(x_t|z_t) of each frame and path, ``[T+1, S, B]``; 0 of missing frames.
            q: Posterior of z_0, batch ``[B]``.
            prior: Prior path.
            path: S paths of each sequence, ``z [T+1, S, B, D]``.
            t: Times ``[T+1]``, or ``[T+1, B]``.
            control: Which flow acts.
            mask: Which frames were observed ``[T+1, B]``, as for `divergence`.

        Returns:
            Log-weights ``[S, F, B]`` of the F parts of a sequence that are bounded apart; their bounds are added.

        Raises:
            NoImportanceWeightsError: If the objective has none.
        """
        raise NoImportanceWeightsError(
            f"the objective {self} has no importance weights, so that there is no log_likelihood under it: give "
            f"{type(self).__name__} the method log_weights(log_p, q, prior, path, t, control) -> [S, F, B]"
        )

    def __str__(self) -> str:
        return self.config["name"]

    def __eq__(self, other: object) -> bool:
        """Whether it is the same bound; a name stands for one of that name."""
        return self.config == other.config if isinstance(other, Objective) else str(self) == other

    def __hash__(self) -> int:
        return hash(str(self))


class PathBound(Objective):
    r"""The bound of a sequence with one latent $z_0$: its divergence is $KL[q(z_0|x_0) \,|\, p(z_0)]$.

    Example:
        >>> PathBound() == "path", PathBound().log_det
        (True, False)
    """

    any_reference = True

    def begin(self, q: Distribution, prior: Prior, z0: Tensor, control: Control) -> Tensor:
        """The divergence at the start, ``[B]``."""
        return start_divergence(q, prior, z0, control)

    def divergence(
        self, start: Tensor, prior: Prior, path: FlowPath, t: Tensor, control: Control, mask: Tensor | None = None
    ) -> Tensor:
        """The divergence at the start, ``[N]``: a flow is deterministic and adds none."""
        return start

    def log_weights(
        self, log_p: Tensor, q: Distribution, prior: Prior, path: FlowPath, t: Tensor, control: Control,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Log-weights of whole sequences, ``[S, 1, B]``."""
        return (log_p.sum(0) - path_log_ratio(q, prior, path, control)).unsqueeze(1)


class MarginalBound(Objective):
    r"""The sum of bounds of single frames, with a latent each: the divergence is $\sum_t E[\ln q_t(z_t) - \ln p_t(z_t)]$.

    Example:
        >>> MarginalBound() == "marginal", MarginalBound().log_det
        (True, True)
    """

    log_det = any_reference = True

    def divergence(
        self, start: Tensor, prior: Prior, path: FlowPath, t: Tensor, control: Control, mask: Tensor | None = None
    ) -> Tensor:
        """The sum of `marginal_log_ratio` over the frames that were observed, ``[N]``."""
        ratio = marginal_log_ratio(start, prior, path, t, control)
        return (ratio if mask is None else torch.where(mask, ratio, 0)).sum(0)

    def log_weights(
        self, log_p: Tensor, q: Distribution, prior: Prior, path: FlowPath, t: Tensor, control: Control,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Log-weights of every frame, ``[S, T+1, B]``; 0 of those that were not observed, which adds nothing."""
        weights = log_p - marginal_log_ratio(q, prior, path, t, control)
        return (weights if mask is None else torch.where(mask.unsqueeze(1), weights, 0)).movedim(1, 0)


declare("objective", path=PathBound, marginal=MarginalBound)


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
        t: Times ``[T]``, or those of each sequence ``[T, B]``.
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
    # Own times are those of the last dimensions of the batch, whatever samples come before it.
    t = t.to(path.z)
    times = t.reshape(len(t), *[1] * (len(batch) + 1 - t.ndim), *t.shape[1:]).expand(path.z.shape[:-1])
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


def choose_observed_frames(
    mask: Tensor, wanted: int | None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`choose_frames` among the frames that were observed, of which each sequence has its own number.

    Args:
        mask: Which frames were observed ``[B, T]``.
        wanted: How many to choose of each sequence; None for all.
        generator: Source of the draw.

    Returns:
        Frame indices and the weight of each, ``[n, B]``, with n at most ``wanted``. A sequence of no more than n frames has
        each of them once at weight 1, and others at weight 0.

    Example:
        >>> index, weight = choose_observed_frames(torch.tensor([[True, False, True], [True, False, False]]), None)
        >>> index.mT.tolist(), weight.mT.tolist()
        ([[0, 2], [0, 0]], [[1.0, 1.0], [1.0, 0.0]])
    """
    count = mask.sum(1)
    most = max(int(count.max()), 1)
    wanted = most if wanted is None else min(wanted, most)
    step = torch.arange(wanted, device=mask.device).unsqueeze(-1)
    rank, weight = step.expand(wanted, len(mask)), (step < count).float()
    if wanted < most:
        offsets = torch.rand(wanted, len(mask), generator=generator, device=mask.device)
        rank = torch.where(count > wanted, ((step + offsets) * (count / wanted)).long(), rank)
        weight = torch.where(count > wanted, count / wanted, weight)
    observed_first = (~mask).byte().argsort(dim=1, stable=True)
    rank = torch.minimum(rank, (count - 1).clamp(min=0))
    return observed_first[torch.arange(len(mask), device=mask.device), rank], weight


def sequence_log_likelihood(
    decoder: Callable[[Tensor], Distribution],
    frames: Tensor,
    z: Tensor,
    wanted: int | None = None,
    generator: torch.Generator | None = None,
    row: Tensor | None = None,
    mask: Tensor | None = None,
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
        mask: Which frames were observed ``[B, T+1]``; the sum is over these alone. None where all were.

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
    path = torch.arange(z.shape[1], device=z.device)
    row = path if row is None else row
    if mask is not None:
        index, weights = (part[:, row] for part in choose_observed_frames(mask, wanted, generator))
        return (weights.to(z) * decoder(z[index, path]).log_prob(frames[row, index])).sum(0)
    index, weight = choose_frames(total, wanted, batch, frames.device, generator)
    index = index[:, row]
    return weight * decoder(z[index, path]).log_prob(frames[row, index]).sum(0)


def chunks(samples: int, chunk: int) -> Sequence[int]:
    """Splits a number of samples into portions of at most ``chunk``."""
    return [min(chunk, samples - begin) for begin in range(0, samples, chunk)]


def log_mean_exp(log_weights: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of exp over the first dimension of tensors that are laid end to end there."""
    joined = torch.cat(list(log_weights))
    return torch.logsumexp(joined, 0) - math.log(len(joined))
