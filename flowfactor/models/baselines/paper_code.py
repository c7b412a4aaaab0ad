"""The objective of the NeurIPS 2023 paper as its code has it, as a control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowfactor import objectives
from flowfactor._checks import check_count, check_optional_count
from flowfactor.control import Control, Schedule
from flowfactor.models.baselines.base import Baseline, Weigh
from flowfactor.models.baselines.po_flow import one_index
from flowfactor.models.terms import Terms
from flowfactor.potentials import Potential

# What the code adds to a variance of its prior.
_FLOOR = 1e-5


@dataclass(frozen=True)
class PaperCodeTerms(Terms):
    """The terms of `PaperCodeVAE`; ``hj`` and ``start`` are as its code has them, summed over steps.

    Attributes:
        density: What stands for the divergence between the densities of z_t, summed over steps.
    """

    density: Tensor = field(default_factory=lambda: torch.zeros(()))


class PaperCodeVAE(Baseline):
    r"""The supervised model of Song et al. (NeurIPS 2023) with the objective of the code that was published with it.

    A control, not a recommendation: it says what the paper's numbers were made by. With $z_t = z_{t-1} +
    \nabla u^k(z_{t-1}, t)$ from a draw of $q(z_0|x_0)$, the loss is

    $$-\sum_t \ln p(x_t|z_t) + KL[q(z_0|x_0) | N(0, I)] + \sum_t (\mathrm{density}_t + \mathrm{hj}_t) + \mathrm{start},$$

    the paper's equation 9 with equation 7 as a penalty, but for these quirks, all kept:

    1. *Diagonal.* For the Laplacian the code takes the gradient of the summed gradient: the Hessian times a vector of
       ones, neither its diagonal nor its trace. It changes a density *per coordinate*, $\rho_d \leftarrow \rho_d - \ln|1 +
       (H 1)_d|$, beginning with $\ln q(z_{0,d}|x_0)$.
    2. *Hamilton-Jacobi.* The residual of a sample is $\sum_b \partial_t u_b + \tfrac12 \mathrm{mean}(|\nabla u|^2) + f^2$:
       the time derivative is summed over the batch, because all samples share one time tensor, and the squared gradient
       is a mean over batch and coordinates. The start term is the mean of $|\nabla u|^2$ *and* of $f^2$ at t = 0. A tanh
       bounds u and f to [-1, 1]. A sum over steps, not a mean.
    3. *Density term.* Not a divergence between the densities: a softmax over *coordinates* of $e^\rho$ for the prior and
       for the posterior, and the divergence of the posterior's from the prior's, that is, in reverse.
    4. *Prior.* D_k is fixed at 1. Its density changes by $\ln|1 + 1|$ in the first step and then by $\ln|1 + 1 /
       (\sigma_{k,t}^2 + 10^{-5})|$ with a learned scale, the same for every coordinate. The gradients of these scales are
       never set to zero, so that every step follows the sum of all gradients so far.
    5. *Steps.* One Euler step a frame, at whole times, with the potential's time read at the step's *end*.

    What belongs to the training loop or the evaluation is not the model's: one transformation per batch (here the means
    and sums over "the batch" run over the sequences of one transformation, which is the same if a batch holds one), the
    running mean that the code prints as E_k, and its likelihood with the sign of the divergence turned round. ``bound``
    and `log_likelihood` are a true bound of the model that the steps define, as in `PoFlow`.

    Args:
        encoder: Maps frames ``[*batch, C, H, W]`` to independent normals with event ``[D]``.
        decoder: Maps latents ``[*batch, D]`` to a distribution of frames, and by ``decoder.mean`` to frames in [0, 1].
        potential: K potentials, `flowfactor.potentials.PaperPotential` in the paper.
        force: K networks f of the same kind.
        max_steps: The largest number of steps T that the prior has scales for.
        frames_per_step: How many frames of a sequence to decode in a training step, weighted so that the sum stays
            unbiased; None for all, as the code does.

    Raises:
        TypeError: If a part is of the wrong kind.
        ValueError: If a setting is out of range or sizes do not match.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_baseline("paper-code", (1, 8, 8), num_flows=2, latent_dim=4)
        >>> frames = torch.rand(6, 5, 1, 8, 8)
        >>> model(frames, torch.arange(5), torch.tensor([0, 0, 0, 1, 1, 1])).loss.backward()
        >>> model.transform(frames[:, 0], [0, 1, 2], control=1).shape
        torch.Size([6, 3, 1, 8, 8])
    """

    objective = "path"
    _parts = ("encoder", "decoder", "potential", "force")
    _settings = ("max_steps", "frames_per_step")
    scale_gradient: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        potential: Potential,
        force: Potential,
        *,
        max_steps: int = 32,
        frames_per_step: int | None = None,
    ) -> None:
        for name, part in (("potential", potential), ("force", force)):
            if not isinstance(part, Potential):
                raise TypeError(f"{name} must be a flowfactor.potentials.Potential, got {type(part).__name__}")
        super().__init__(encoder, decoder, potential.num_flows)
        if {(potential.dim, potential.num_flows), (force.dim, force.num_flows)} != {(self.latent_dim, self.num_flows)}:
            raise ValueError(
                f"potential and force must have states of size {self.latent_dim} and {self.num_flows} flows, got "
                f"{potential.dim} and {potential.num_flows}, {force.dim} and {force.num_flows}"
            )
        self.potential, self.force = potential, force
        self.max_steps = check_count("max_steps", max_steps)
        self.frames_per_step = check_optional_count("frames_per_step", frames_per_step)
        self.prior_scale = nn.Parameter(torch.ones(self.num_flows, self.max_steps))
        self.register_buffer("scale_gradient", torch.zeros(self.num_flows, self.max_steps))

    def path(self, z0: Tensor, t: Tensor, control: Control) -> Tensor:
        """The states at all times, by Euler steps of at most one frame; time is read at the end of a step.

        Args:
            z0: States at ``t[0]``, ``[*batch, D]``.
            t: Times ``[T]``, in frames.
            control: Which flow acts.

        Returns:
            States ``[T, *batch, D]``.

        Raises:
            ValueError: If a time, or a switching time of a schedule, asks for its gradient.
        """
        moments = control.moments if isinstance(control, Schedule) else ()
        if any(isinstance(m, Tensor) and m.requires_grad for m in (t, *moments)):
            raise ValueError(
                "a PaperCodeVAE counts whole steps, as its code does, and gives times and switching times no gradient: "
                "hand over t.detach(), or take a model with a latent flow"
            )
        states = [z0]
        for begin, end in zip(t[:-1].tolist(), t[1:].tolist(), strict=True):
            z = states[-1]
            for a, b, piece in (
                control.segments(begin, end) if isinstance(control, Schedule) else [(begin, end, control)]
            ):
                steps = max(1, math.ceil(abs(b - a) - 1e-6))
                for step in range(1, steps + 1):
                    gradient = self.potential.derivatives(z, a + (b - a) * step / steps, piece).gradient
                    assert gradient is not None
                    z = z + (b - a) / steps * gradient
            states.append(z)
        return torch.stack(states)

    def transform(
        self, x0: Tensor, t: Tensor | Sequence[float], control: Control = 0, *, context: None = None
    ) -> Tensor:
        """Transforms images by the steps of `path`, from the mean of their posterior.

        Args:
            x0: Images at ``t[0]``, ``[B, C, H, W]``.
            t: Times ``[T]`` in frames, strictly monotone.
            control: Which flow acts: an int, one index per image, weights ``[B, K]`` to superpose, or a `Schedule`.
            context: Refused: a baseline knows none.

        Returns:
            Frames ``[B, T, C, H, W]``, the first the reconstruction of ``x0``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
        """
        when = self._checked_transform(x0, t, control, context)
        return self.decode(self.path(self.encode(x0).mean, when, control)).movedim(0, 1)

    def forward(
        self, frames: Tensor, t: Tensor, k: int | Tensor, *, generator: torch.Generator | None = None
    ) -> PaperCodeTerms:
        """The terms of the objective on a batch of sequences.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1].
            t: Times 0, 1, ..., T; the code knows no others.
            k: Which transformation acts: an int or one index a sequence ``[B]``.
            generator: Source of all draws.

        Returns:
            The terms, batch means.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
        """
        frames, t = self._checked(frames, t, k, generator)
        k = one_index(k, frames)
        total = frames.shape[1]
        if total - 1 > self.max_steps:
            raise ValueError(
                f"sequences have {total - 1} steps and the prior scales for {self.max_steps}: set max_steps"
            )
        if not torch.equal(t, torch.arange(total).to(t)):
            raise ValueError(f"this control takes unit steps from time 0, as its code does; got times {t.tolist()}")
        q = self.encode(frames[:, 0])
        z0 = objectives.draw(q, generator=generator)
        kl = objectives.start_divergence(q, self.prior, z0, 0).mean()
        path, density, hj, start = self._steps(q, z0, k, total - 1)
        wanted = self.frames_per_step if self.training else None
        reconstruction = objectives.sequence_log_likelihood(self.decoder, frames, path, wanted, generator).mean()
        loss = kl - reconstruction + density + hj + start
        return PaperCodeTerms(loss, reconstruction, kl, hj, start, reconstruction - kl, density=density)

    def _steps(self, q: Any, z: Tensor, k: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Walks along the path, with the code's three penalties."""
        states, posterior, prior = [z], q.base_dist.log_prob(z), torch.distributions.Normal(0.0, 1.0).log_prob(z)
        density = hj = z.new_zeros(())
        start = self._start(z, k) if steps else density
        for step in range(1, steps + 1):
            u_t, gradient, diagonal = self._derivatives(z, float(step), k)
            f = self.force(z, float(step), k)
            each = _per_flow(u_t, k, self.num_flows, mean=False)
            each = each + 0.5 * _per_flow(gradient.square().mean(-1), k, self.num_flows, mean=True)
            hj = hj + (each + f.square()).square().mean()
            posterior = posterior - (1 + diagonal).abs().log()
            prior = prior - (1 + self._prior_laplacian(k, step)).abs().log()
            z = z + gradient
            states.append(z)
            density = density + softmax_divergence(posterior, prior).mean()
        return torch.stack(states), density, hj, start

    def _derivatives(self, z: Tensor, t: float, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Time derivative, gradient, and the gradient of the summed gradient, the Hessian times ones."""

        def slopes(z: Tensor) -> tuple[Tensor, Tensor]:
            d = self.potential.derivatives(z, t, k)
            assert d.time is not None and d.gradient is not None
            return d.gradient, d.time

        result: Any = torch.func.jvp(slopes, (z,), (torch.ones_like(z),), has_aux=True)
        gradient, diagonal, u_t = result
        return u_t, gradient, diagonal

    def _start(self, z: Tensor, k: Tensor) -> Tensor:
        gradient = self.potential.derivatives(z, 0.0, k).gradient
        assert gradient is not None
        return gradient.square().mean() + self.force(z, 0.0, k).square().mean()

    def _prior_laplacian(self, k: Tensor, step: int) -> Tensor:
        """The second derivative of the prior's potential, ``[B, 1]``: 1 in the first step, learned scales after it."""
        if step == 1:
            return torch.ones_like(self.prior_scale[k, :1])
        scale = _NeverZeroed.apply(self.prior_scale, self.scale_gradient)
        return 1 / (scale[k, step - 1].square() + _FLOOR).unsqueeze(-1)

    def _importance(self, frames: Tensor, t: Tensor, k: Control, generator: torch.Generator | None) -> Weigh:
        return self._importance_of_paths(frames, lambda z0: self.path(z0, t, k), generator)


class _NeverZeroed(torch.autograd.Function):
    """The identity, whose backward adds the gradient to a running total and passes the total on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, total: Tensor) -> Tensor:
        ctx.total = total
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.total += gradients[0]
        return ctx.total.clone(), None


def softmax_divergence(posterior: Tensor, prior: Tensor) -> Tensor:
    r"""The code's "divergence": $\sum_d p_d \ln (p_d / q_d)$ of softmaxes over coordinates of $e^\rho$, ``[*batch]``.

    Args:
        posterior: Log-densities per coordinate, ``[*batch, D]``; they give q.
        prior: Log-densities per coordinate, ``[*batch, D]``; they give p.

    Returns:
        The values, of the reverse divergence.

    Example:
        >>> import torch
        >>> softmax_divergence(torch.randn(3, 4), torch.zeros(3, 4)).shape
        torch.Size([3])
    """
    log_p, log_q = prior.exp().log_softmax(-1), posterior.exp().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _per_flow(values: Tensor, k: Tensor, num_flows: int, *, mean: bool) -> Tensor:
    """For every sample, the sum or mean of values ``[B]`` over the samples of its flow."""
    total = values.new_zeros(num_flows).index_add(0, k, values)
    if mean:
        total = total / k.bincount(minlength=num_flows).clamp(min=1)
    return total[k]
