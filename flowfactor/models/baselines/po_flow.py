"""PoFlow: latent traversals along the gradients of wave potentials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flowfactor import objectives
from flowfactor.control import Control, Schedule
from flowfactor.fields import GradientField
from flowfactor.latent_flow import LatentFlow
from flowfactor.models.baselines.base import Baseline, Weigh
from flowfactor.models.checks import check_weight
from flowfactor.models.terms import Terms
from flowfactor.potentials import Potential
from flowfactor.solver import Solver


@dataclass(frozen=True)
class PoFlowTerms(Terms):
    """The terms of `PoFlow`; ``start`` is |grad u(z_0, 0)|^2.

    Attributes:
        wave: The squared residual of the wave equation, mean over the path.
        variation: How much a step changes the picture: the squared Jacobian-vector product, mean over pixels.
        match: Distance between flowed and encoded latents, and between their steps, mean over coordinates.
    """

    wave: Tensor = field(default_factory=lambda: torch.zeros(()))
    variation: Tensor = field(default_factory=lambda: torch.zeros(()))
    match: Tensor = field(default_factory=lambda: torch.zeros(()))


class PoFlow(Baseline):
    r"""Traversals as potential flows under wave equations (Song, Keller, Sebe and Welling, ICML 2023), with a VAE.

    Transformation k moves a latent by one gradient step a frame, $z_{t+1} = z_t + \nabla u^k(z_t, t)$, and a
    physics-informed loss (their section 3) asks each potential for a wave equation with a learned speed and a start at
    rest:

    $$L_u = \frac1T \sum_t \bigl( \partial_{tt} u^k - c_k^2 \Delta u^k \bigr)^2 + |\nabla u^k(z_0, 0)|^2 .$$

    A Jacobian regularizer $-|J_g \nabla u^k(z_t, t)|^2$ of the decoder g asks each step for the largest change of the
    picture. As in their training of a VAE from scratch, with one time t drawn for each sequence, the loss adds the VAE's
    own terms for $x_0$, those of the transformed frame, $-\ln p(x_t|z_t) + KL[q(z|x_t)|p(z)]$, and the squared distance
    between the flowed and the encoded latents and between their steps from t-1 to t (means over coordinates).

    Where their code takes the gradient of the summed gradient, Hessian times ones, for $\Delta u$, here stands what the
    paper says: the trace. ``bound`` and `log_likelihood` are those of the model that the flow defines with $z_0$ as
    the one latent, $\ln p(x_{0..T}) \ge E_{q(z_0|x_0)} \sum_t \ln p(x_t|z_t) - KL[q(z_0|x_0)|p(z_0)]$.

    Args:
        encoder: Maps frames ``[*batch, C, H, W]`` to a distribution of latents with event ``[D]``.
        decoder: Maps latents ``[*batch, D]`` to a distribution of frames, and by ``decoder.mean`` to frames in [0, 1].
        potential: K potentials; theirs is `flowfactor.potentials.PaperPotential`.
        wave_weight: Weight of L_u.
        jacobian_weight: Weight of the Jacobian regularizer; in their code it is that of L_u.
        match_weight: Weight of the distance between flowed and encoded latents.

    Raises:
        TypeError: If a part is of the wrong kind.
        ValueError: If a setting is out of range or sizes do not match.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_baseline("po-flow", (1, 8, 8), num_flows=2, latent_dim=4)
        >>> frames = torch.rand(6, 5, 1, 8, 8)
        >>> model(frames, torch.arange(5), torch.tensor([0, 0, 0, 1, 1, 1])).loss.backward()
        >>> model.transform(frames[:, 0], [0, 1, 2], control=1).shape
        torch.Size([6, 3, 1, 8, 8])
    """

    objective = "path"
    _parts = ("encoder", "decoder", "potential")
    _settings = ("wave_weight", "jacobian_weight", "match_weight")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        potential: Potential,
        *,
        wave_weight: float = 1.0,
        jacobian_weight: float = 1.0,
        match_weight: float = 1.0,
    ) -> None:
        if not isinstance(potential, Potential):
            raise TypeError(f"potential must be a flowfactor.potentials.Potential, got {type(potential).__name__}")
        super().__init__(encoder, decoder, potential.num_flows)
        if potential.dim != self.latent_dim:
            raise ValueError(f"the potential has states of size {potential.dim} and the encoder {self.latent_dim}")
        self.flow = LatentFlow(potential, Solver("euler"))
        self.speed = nn.Parameter(torch.ones(potential.num_flows))
        self.wave_weight = check_weight("wave_weight", wave_weight)
        self.jacobian_weight = check_weight("jacobian_weight", jacobian_weight)
        self.match_weight = check_weight("match_weight", match_weight)

    @property
    def potential(self) -> Potential:
        """The K potentials."""
        field = self.flow.field
        assert isinstance(field, GradientField)  # what LatentFlow makes of a potential
        return field.potential

    def transform(
        self, x0: Tensor, t: Tensor | Sequence[float], control: Control = 0, *, context: None = None
    ) -> Tensor:
        """Transforms images along the potentials' gradients, from the mean of their posterior.

        Args:
            x0: Images at ``t[0]``, ``[B, C, H, W]``.
            t: Times ``[T]`` in frames, strictly monotone; one gradient step leads from each to the next.
            control: Which flow acts: an int, one index per image, weights ``[B, K]`` to superpose, or a `Schedule`.
            context: Refused: a baseline knows none.

        Returns:
            Frames ``[B, T, C, H, W]``, the first the reconstruction of ``x0``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
            FlowSolveError: If a state becomes NaN or infinite.
        """
        when = self._checked_transform(x0, t, control, context)
        path = self.flow(self.encode(x0).mean, when, control)
        return self.decode(path.z).movedim(0, 1)

    def forward(
        self, frames: Tensor, t: Tensor, k: int | Tensor, *, generator: torch.Generator | None = None
    ) -> PoFlowTerms:
        """The terms of the objective on a batch of sequences.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1], of at least 2 frames.
            t: Times ``[T+1]``, in frames.
            k: Which transformation acts: an int or one index a sequence ``[B]``.
            generator: Source of all draws.

        Returns:
            The terms, batch means. While training, ``reconstruction`` and ``bound`` are unbiased estimates from two
            frames.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
        """
        frames, t = self._checked(frames, t, k, generator)
        k = one_index(k, frames)
        batch, total = frames.shape[:2]
        if total < 2:
            raise ValueError("PoFlow learns from transformed frames: sequences need at least 2 frames")
        # The time t of each sequence, at least 1: its frame, and the one before it for the step between them.
        now = torch.randint(1, total, (batch,), generator=generator, device=frames.device)
        sample = torch.arange(batch, device=frames.device)
        x = torch.stack([frames[:, 0], frames[sample, now - 1], frames[sample, now]])
        q = self.encode(x)
        drawn = objectives.draw(q, generator=generator)
        kl = objectives.start_divergence(q, self.prior, drawn, 0).mean(-1)
        path = self.flow(drawn[0], t, k).z
        before, after = path[now - 1, sample], path[now, sample]
        log_p = self.decoder(torch.stack([drawn[0], after])).log_prob(x[[0, 2]]).mean(-1)
        wave, start = self._physics(path[:-1], t[:-1], k)
        variation = self._variation(after, t[now], k)
        match = (drawn[2] - after).square().mean() + (drawn[1] - before).square().mean()
        match = match + (drawn[2] - drawn[1] - after + before).square().mean()
        loss = kl[0] + kl[2] - log_p.sum() + self.wave_weight * (wave + start)
        loss = loss - self.jacobian_weight * variation + self.match_weight * match
        if self.training:
            reconstruction = log_p[0] + (total - 1) * log_p[1]
        else:
            reconstruction = self.decoder(path).log_prob(frames.movedim(1, 0)).sum(0).mean()
        return PoFlowTerms(
            loss, reconstruction, kl[0], kl.new_zeros(()), start, reconstruction - kl[0],
            wave=wave, variation=variation, match=match,
        )  # fmt: skip

    def _physics(self, z: Tensor, t: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The mean squared residual of the wave equation over a path ``[T, B, D]``, and the squared speed at rest."""
        when = t.unsqueeze(-1).expand(z.shape[:-1])
        residual = wave_residual(self.potential, z, when, k.expand(z.shape[:-1]), self.speed)
        gradient = self.potential.derivatives(z[0], 0.0, k).gradient
        assert gradient is not None
        return residual.square().mean(), gradient.square().sum(-1).mean()

    def _variation(self, z: Tensor, t: Tensor, k: Tensor) -> Tensor:
        """The squared Jacobian-vector product of the decoder with the next step, mean over pixels."""
        step = self.flow.velocity(z, t, k)
        change = torch.func.jvp(self.decode, (z,), (step,))[1]
        return change.square().mean()

    def _importance(self, frames: Tensor, t: Tensor, k: Control, generator: torch.Generator | None) -> Weigh:
        return self._importance_of_paths(frames, lambda z0: self.flow(z0, t, k).z, generator)


def wave_residual(potential: Potential, z: Tensor, t: Tensor, k: int | Tensor, speed: Tensor) -> Tensor:
    r"""The residual $\partial_{tt} u_k - c_k^2 \Delta u_k$ of the wave equation, per sample.

    Args:
        potential: The potentials.
        z: States ``[*batch, D]``.
        t: Times ``[*batch]``, in frames.
        k: Which flow, an int or ``[*batch]``.
        speed: Speeds c, ``[K]``.

    Returns:
        Residuals ``[*batch]``.

    Example:
        >>> import torch, flowfactor as ff
        >>> wave = ff.potentials.from_module(lambda z, t: torch.sin(z[..., 0] - 3.0 * t), dim=2)
        >>> r = wave_residual(wave, torch.randn(5, 2), torch.rand(5), 0, torch.tensor([3.0]))
        >>> bool(r.abs().max() < 1e-5)
        True
    """

    def slope(t: Tensor) -> Tensor:
        time = potential.derivatives(z, t, k).time
        assert time is not None
        return time

    # A sample's value depends on its own time alone, so one forward derivative gives every second derivative.
    # Forward derivatives write into the times: an expanded tensor has to become one of its own.
    t = t.contiguous()
    curvature = torch.func.jvp(slope, (t,), (torch.ones_like(t),))[1]
    laplacian = potential.derivatives(z, t, k, laplacian="exact").laplacian
    assert laplacian is not None
    return curvature - speed[k].square() * laplacian


def one_index(k: Control, frames: Tensor) -> Tensor:
    """The flow of each sequence ``[B]``; raises TypeError for weights and schedules."""
    if isinstance(k, Schedule) or (isinstance(k, Tensor) and k.is_floating_point()):
        raise TypeError("this model trains on one flow a sequence: k must be an int or one index a sequence [B]")
    return torch.as_tensor(k, device=frames.device).long().expand(len(frames))
