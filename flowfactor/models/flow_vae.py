"""The flow-factorized variational autoencoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from flowfactor import objectives
from flowfactor.control import Control
from flowfactor.latent_flow import LatentFlow
from flowfactor.models.checks import check_batch_control, check_frames, check_generator, check_weight
from flowfactor.models.pretrained import PretrainedMixin
from flowfactor.models.terms import Terms
from flowfactor.path import FlowPath
from flowfactor.priors import Prior, StandardNormal
from flowfactor.regularizers import HamiltonJacobi, NegativeSquare, StartAtRest


class FlowFactorizedVAE(PretrainedMixin, nn.Module):
    r"""A sequence model in which each transformation is a latent flow (Song et al., NeurIPS 2023), supervised.

    An encoder gives q(z_0|x_0), the flow of transformation k carries z_0 to z_1, z_2, ..., and a decoder gives
    p(x_t|z_t). Trained by one of the bounds of `flowfactor.objectives`, plus the squared Hamilton-Jacobi residual
    (mean over time) and the squared speed at the start, which ask the flow for dynamic optimal transport.

    Args:
        encoder: Maps frames ``[*batch, C, H, W]`` to a distribution of latents with event ``[D]``.
        decoder: Maps latents ``[*batch, D]`` to a distribution of frames, and by ``decoder.mean`` to frames in [0, 1].
        flow: The latent flow, with K flows.
        prior: The prior, or prior path, of the latents; standard normal where None.
        objective: ``"path"`` or ``"marginal"``.
        kl_weight: Weight of the divergence; 1 for a true bound.
        hj_weight: Weight of the Hamilton-Jacobi residual; 0 leaves it out. Fields without potential have none.
        start_weight: Weight of the squared speed at the start; 0 leaves it out.
        force: The force f of the Hamilton-Jacobi equation: ``"negative_square"`` for a learned one, None for f = 0, or
            a module f(z, t).
        frames_per_step: How many frames of a sequence to decode in a training step, drawn anew each time and weighted
            so that the bound stays unbiased; None for all.

    Raises:
        TypeError: If a part is of the wrong kind.
        ValueError: If a setting is out of range or sizes do not match.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_vae(image_shape=(1, 8, 8), num_flows=2, latent_dim=4, hidden=(16, 16))
        >>> frames = torch.rand(6, 5, 1, 8, 8)                     # 6 sequences of 5 frames
        >>> terms = model(frames, torch.arange(5), torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> terms.loss.backward()
        >>> model.transform(frames[:, 0], [0, 1, 2], control=1).shape
        torch.Size([6, 3, 1, 8, 8])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        flow: LatentFlow,
        prior: Prior | None = None,
        *,
        objective: Literal["path", "marginal"] = "path",
        kl_weight: float = 1.0,
        hj_weight: float = 1.0,
        start_weight: float = 1.0,
        force: nn.Module | Literal["negative_square"] | None = "negative_square",
        frames_per_step: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(flow, LatentFlow):
            raise TypeError(f"flow must be a flowfactor.LatentFlow, got {type(flow).__name__}")
        if objective not in objectives.OBJECTIVES:
            raise ValueError(f"objective must be one of {objectives.OBJECTIVES}, got {objective!r}")
        if frames_per_step is not None and (not isinstance(frames_per_step, int) or frames_per_step < 1):
            raise ValueError(f"frames_per_step must be a positive integer or None, got {frames_per_step!r}")
        for name, part in (("encoder", encoder), ("decoder", decoder), ("prior", prior)):
            size = getattr(part, "latent_dim", getattr(part, "dim", flow.dim))
            if size != flow.dim:
                raise ValueError(f"the {name} has latents of size {size} and the flow of size {flow.dim}")
        if isinstance(force, str) and force != "negative_square":
            raise ValueError(f'force must be "negative_square", None or a module f(z, t), got {force!r}')
        self.encoder = encoder
        self.decoder = decoder
        self.flow = flow
        self.prior: Prior = StandardNormal(flow.dim) if prior is None else prior
        self.objective = objective
        self.kl_weight = check_weight("kl_weight", kl_weight)
        self.hj_weight = check_weight("hj_weight", hj_weight)
        self.start_weight = check_weight("start_weight", start_weight)
        self.frames_per_step = frames_per_step
        penalised = self.hj_weight > 0 and flow.field.has_potential
        if isinstance(force, str):  # a learned force that nothing trains would be a dead parameter
            force = NegativeSquare(flow.dim) if penalised else None
        self.hamilton_jacobi = HamiltonJacobi(force)  # pyright: ignore[reportArgumentType]
        self._start_at_rest = StartAtRest()

    @property
    def num_flows(self) -> int:
        """K, the number of flows."""
        return self.flow.num_flows

    @property
    def force(self) -> Any:
        """The force of the Hamilton-Jacobi equation, or None."""
        return self.hamilton_jacobi.force

    def encode(self, x: Tensor) -> Distribution:
        """The posterior q(z|x) of frames ``[*batch, C, H, W]``: a distribution with event ``[D]``."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """The mean frames of latents ``[*batch, D]``, in [0, 1], ``[*batch, C, H, W]``."""
        return self.decoder.mean(z)  # type: ignore[operator]

    def transform(self, x0: Tensor, t: Tensor | Sequence[float], control: Control = 0) -> Tensor:
        """Transforms images along the latent flows, from the mean of their posterior.

        Args:
            x0: Images at ``t[0]``, ``[B, C, H, W]``.
            t: Times ``[T]`` in frames, strictly monotone; backwards undoes a transformation.
            control: Which flow acts: an int, one index per image, weights ``[B, K]`` to superpose, or a `Schedule`.

        Returns:
            Frames ``[B, T, C, H, W]``, the first the reconstruction of ``x0``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
            FlowSolveError: If the solve fails.
        """
        path = self.flow(self.encode(x0).mean, t, control)
        return self.decode(path.z).movedim(0, 1)

    def forward(self, frames: Tensor, t: Tensor, k: Control, *, generator: torch.Generator | None = None) -> Terms:
        """The terms of the objective on a batch of sequences.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1].
            t: Times ``[T+1]``, in frames; the prior starts at time 0.
            k: Which transformation acts: an int, one index a sequence ``[B]``, weights or a schedule.
            generator: Source of all draws.

        Returns:
            The terms, batch means.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
            FlowSolveError: If the solve fails.
        """
        frames, t = check_frames(frames, t, getattr(self.decoder, "event", None))
        check_batch_control(k, len(frames))
        check_generator(generator, frames.device)
        q = self.encode(frames[:, 0])
        z0 = objectives.draw(q, generator=generator)
        marginal = self.objective == "marginal"
        penalised = self.hj_weight > 0 and self.flow.field.has_potential
        costs = {"hj": self.hamilton_jacobi} if penalised else {}
        path = self.flow(z0, t, k, log_det=marginal, costs=costs, generator=generator)
        reconstruction = self._reconstruction(frames, path, generator)
        if marginal:
            kl = objectives.marginal_log_ratio(q, self.prior, path, t, k).sum(0)
        else:
            kl = objectives.start_divergence(q, self.prior, z0, k)
        zero = z0.new_zeros(())
        span = (t[-1] - t[0]).abs()
        hj = (path.costs["hj"][-1] / span).mean() if penalised and len(t) > 1 else zero
        start = self._start_at_rest(self.flow, z0, k, t[0]).mean() if self.start_weight > 0 else zero
        reconstruction, kl = reconstruction.mean(), kl.mean()
        loss = -reconstruction + self.kl_weight * kl + self.hj_weight * hj + self.start_weight * start
        return Terms(loss, reconstruction, kl, hj, start, reconstruction - kl)

    def _reconstruction(self, frames: Tensor, path: FlowPath, generator: torch.Generator | None) -> Tensor:
        """E ln p(x_t|z_t) summed over frames, ``[B]``; from a few frames each while training, if so set."""
        total, batch = path.z.shape[0], frames.shape[0]
        wanted = self.frames_per_step if self.training else None
        if wanted is None or wanted >= total:
            return self.decoder(path.z).log_prob(frames.movedim(1, 0)).sum(0)
        index, weight = objectives.choose_frames(total, wanted, batch, frames.device, generator)
        sample = torch.arange(batch, device=frames.device)
        chosen = self.decoder(path.z[index, sample]).log_prob(frames[sample, index])
        return weight * chosen.sum(0)

    def log_likelihood(
        self,
        frames: Tensor,
        t: Tensor,
        k: Control,
        samples: int = 64,
        *,
        generator: torch.Generator | None = None,
        chunk: int = 8,
    ) -> Tensor:
        r"""The importance-weighted bound (Burda et al., ICLR 2016, eq. 8) of each sequence.

        Under ``path`` it bounds $\ln p(x_{0..T}|k)$, with $z_0$ as the one latent; under ``marginal`` it bounds
        $\sum_t \ln p_t(x_t|k)$. It grows with ``samples`` towards the log-likelihood.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1].
            t: Times ``[T+1]``, in frames.
            k: Which transformation acts.
            samples: S, the number of importance samples.
            generator: Source of the draws.
            chunk: Samples decoded at a time, to bound memory.

        Returns:
            Bounds ``[B]``, in nats per sequence.

        Raises:
            ValueError: If ``samples`` is not positive or an argument does not fit.
        """
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples must be a positive integer, got {samples!r}")
        frames, t = check_frames(frames, t, getattr(self.decoder, "event", None))
        check_batch_control(k, len(frames))
        marginal = self.objective == "marginal"
        q = self.encode(frames[:, 0])
        weights: list[Tensor] = []
        for begin in range(0, samples, chunk):
            z0 = objectives.draw(q, (min(chunk, samples - begin),), generator)
            path = self.flow(z0, t, k, log_det=marginal, generator=generator)
            # [T+1, S, B]: frames against every sample's decoded path.
            log_p = torch.stack([self.decoder(z).log_prob(x) for z, x in zip(path.z, frames.unbind(1), strict=True)])
            if marginal:
                weights.append(log_p - objectives.marginal_log_ratio(q, self.prior, path, t, k))
            else:
                weights.append((log_p.sum(0) - objectives.path_log_ratio(q, self.prior, path, k)).unsqueeze(0))
        log_w = torch.cat(weights, 1)
        return (torch.logsumexp(log_w, 1) - math.log(samples)).sum(0)
