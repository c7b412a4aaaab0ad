"""Sparse transformation analysis: which flows act, and how strongly, is inferred from the frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import binary_cross_entropy_with_logits

from flowfactor import objectives
from flowfactor._checks import check_count, check_optional_count
from flowfactor.context import Context
from flowfactor.control import Control, Schedule
from flowfactor.encoders import PairEncoder, SparseWeights
from flowfactor.latent_flow import LatentFlow
from flowfactor.models._sparse_parts import (
    check_pair_encoder,
    course,
    flattened,
    follow_intervals,
    follow_unit,
    intervals_seen,
    make_weights_prior,
    sparse_schedule,
    stretch,
)
from flowfactor.models._split import flow_for
from flowfactor.models.base import FlowModel
from flowfactor.models.checks import check_generator, check_weight
from flowfactor.models.inputs import Inputs
from flowfactor.models.responsibilities import anneal, balanced_responsibilities
from flowfactor.models.terms import Terms
from flowfactor.path import FlowPath
from flowfactor.priors import Prior, SpikeAndSlab

Solved: TypeAlias = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
"""Reconstruction, divergence of the weights, lesson of the spikes, and the regularizers by name, ``[B]`` each."""


class SparseTransformationVAE(FlowModel):
    r"""A sequence model that finds its transformations unsupervised (Song et al. 2025, arXiv 2410.05564).

    An encoder gives $q(z_0|x_0)$. From each pair of neighbouring frames a second one gives sparse weights $g_s^k$, a
    spike times a slab for each of K flows, and the state follows $\dot z = \sum_k g_s^k (\nabla u_k + r_k)(z, t)$ from
    $t_s$ to $t_{s+1}$. Trained by the bound

    $$\ln p(x_{0..T}) \ge E_q \sum_t \ln p(x_t|z_t) - KL[q(z_0|x_0)|p(z_0)] - KL[q(g|x_{0..T})|p(g)]$$

    with the squared Hamilton-Jacobi residual of u and the squared speed at the start as in `FlowFactorizedVAE`. Both
    divergences are in closed form; spikes are drawn exactly and pass gradients by the binary concrete relaxation, whose
    temperature falls with the training steps.

    At the start nothing distinguishes the flows. The first ``warmup_steps`` therefore suppose that one flow acts alone:
    all K are tried on a frame of each sequence, and `balanced_responsibilities` say which learns from which sequence, at a
    falling temperature: each trains one, drawn by them. The spikes learn to predict them. After that the bound alone
    decides, and any number of flows may act.

    Weights are in units of a flow's typical strength while it acts, a running mean: ``control=k`` is flow k at that.

    Args:
        encoder: Maps frames ``[*batch, C, H, W]`` to a distribution of latents with event ``[D]``.
        decoder: Maps latents ``[*batch, D]`` to a distribution of frames, and by ``decoder.mean`` to frames in [0, 1].
        flow: The latent flow, with K flows.
        pair_encoder: Maps sequences to `SparseWeights`: a `PairEncoder`, its config, or a module with ``num_flows`` and
            ``controls``. Two controls (double control) need a `HelmholtzField`.
        prior: The prior of the latents; standard normal where None.
        weights_prior: The prior of the weights, a `SpikeAndSlab` or its config; where None, one in K flows is expected
            to act, with persistence 0.9 and the pair encoder's slab.
        kl_weight: Weight of the divergence of z_0; 1 for a true bound.
        factor_weight: Weight of the divergence of the weights g; 1 for a true bound.
        hj_weight: Weight of the Hamilton-Jacobi residual; 0 leaves it out.
        start_weight: Weight of the squared speed at the start; 0 leaves it out.
        solenoidal_weight: As in `FlowFactorizedVAE`.
        acceleration_weight: As in `FlowFactorizedVAE`; that the weights g switch between frames is no acceleration.
        code_weight: As in `FlowFactorizedVAE`.
        commutator_weight: As in `FlowFactorizedVAE`, of the flows at weight 1.
        error_weight: As in `FlowFactorizedVAE`.
        relative_weights: Whether these are relative to the size of a frame, as in `FlowFactorizedVAE`.
        force: As in `FlowFactorizedVAE`.
        frames_per_step: How many frames to decode in a training step, as in `FlowFactorizedVAE`.
        regularize_every: In one of how many training steps to take the regularizers, as in `FlowFactorizedVAE`.
        temperature: Temperature of the relaxed spikes after the warm-up, and where it ends.
        anneal_steps: Training steps from one to the other.
        warmup_steps: Training steps of the warm-up; 0 for none.
        warmup_temperature: Temperature of the responsibilities at its start and end, in nats.
        warmup_span: Intervals over which the warm-up supposes one flow: None for the whole sequence, in which exactly
            one acts; a number for stretches of that length, in which one or none acts, as often as in the prior. Where
            transformations combine or switch, take 1, and a longer warm-up (500 steps).

    Raises:
        TypeError: If a part is of the wrong kind.
        ValueError: If a setting is out of range or sizes do not match.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_sparse_vae(image_shape=(1, 8, 8), num_flows=2, latent_dim=4, hidden=(16, 16))
        >>> frames = torch.rand(6, 5, 1, 8, 8)                     # 6 sequences of 5 frames
        >>> model(frames, torch.arange(5)).loss.backward()
        >>> model.infer_weights(frames).spike_probs.shape          # 4 pairs of frames, 2 flows
        torch.Size([6, 4, 2])
        >>> model.infer_factor(frames).probs.shape
        torch.Size([6, 2])
        >>> model.transform(frames[:, 0], [0, 1, 2], control=1).shape
        torch.Size([6, 3, 1, 8, 8])
    """

    objective = "path"
    supervision = "none"
    _parts = (*FlowModel._parts, "pair_encoder", "weights_prior")
    _settings = (
        "kl_weight", "factor_weight", "hj_weight", "start_weight", "solenoidal_weight", "acceleration_weight",
        "code_weight", "commutator_weight", "error_weight", "relative_weights", "frames_per_step", "regularize_every",
        "temperature", "anneal_steps", "warmup_steps", "warmup_temperature", "warmup_span",
    )  # fmt: skip
    step: Tensor
    unit: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        flow: LatentFlow,
        pair_encoder: nn.Module | Mapping[str, Any],
        prior: Prior | None = None,
        weights_prior: SpikeAndSlab | Mapping[str, Any] | None = None,
        *,
        kl_weight: float = 1.0,
        factor_weight: float = 1.0,
        hj_weight: float = 1.0,
        start_weight: float = 1.0,
        solenoidal_weight: float = 0.0,
        acceleration_weight: float = 0.0,
        code_weight: float = 0.0,
        commutator_weight: float = 0.0,
        error_weight: float = 0.0,
        relative_weights: bool = False,
        force: nn.Module | str | None = "negative_square",
        frames_per_step: int | None = None,
        regularize_every: int = 1,
        temperature: Sequence[float] = (1.0, 0.3),
        anneal_steps: int = 2000,
        warmup_steps: int = 200,
        warmup_temperature: Sequence[float] = (300.0, 10.0),
        warmup_span: int | None = None,
    ) -> None:
        if isinstance(pair_encoder, Mapping):
            pair_encoder = PairEncoder(**pair_encoder)
        super().__init__(
            encoder, decoder, flow, kl_weight=kl_weight, hj_weight=hj_weight, start_weight=start_weight,
            solenoidal_weight=solenoidal_weight, acceleration_weight=acceleration_weight, code_weight=code_weight,
            relative_weights=relative_weights, frames_per_step=frames_per_step, regularize_every=regularize_every,
            commutator_weight=commutator_weight, error_weight=error_weight,
        )  # fmt: skip
        check_pair_encoder(pair_encoder, flow)
        self.pair_encoder: Any = pair_encoder
        self._set_prior(prior)
        self.weights_prior = make_weights_prior(weights_prior, pair_encoder, flow.num_flows)
        self.factor_weight = check_weight("factor_weight", factor_weight)
        self.temperature = course("temperature", temperature)
        self.warmup_temperature = course("warmup_temperature", warmup_temperature)
        self.anneal_steps = check_count("anneal_steps", anneal_steps, 0)
        self.warmup_steps = check_count("warmup_steps", warmup_steps, 0)
        self.warmup_span = check_optional_count("warmup_span", warmup_span)
        self._set_force(force)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("unit", torch.ones(flow.num_flows, self.controls))

    @property
    def controls(self) -> int:
        """Weights of a flow: 1, or 2 under double control."""
        return int(self.pair_encoder.controls)

    @property
    def spike_temperature(self) -> float:
        """Temperature of the relaxed spikes at this step of the training."""
        return anneal(self.temperature, int(self.step) - self.warmup_steps, self.anneal_steps)

    @property
    def warming_up(self) -> bool:
        """Whether the training is in its warm-up."""
        return int(self.step) < self.warmup_steps

    def infer_weights(self, frames: Tensor) -> SparseWeights:
        """The posterior q(g|x) of the weights over each interval between neighbouring frames.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1].

        Returns:
            A distribution with ``spike_probs [B, T, K]``, and ``mean`` and draws ``[B, T, K, C]`` in units of each
            flow's typical strength.

        Raises:
            TypeError: If frames are no floats.
            ValueError: If their shape does not fit.
        """
        return self.pair_encoder(frames).in_units(self.unit)

    def infer_factor(self, frames: Tensor) -> Categorical:
        """Which flow dominates each sequence: its share in the expected size of the weights.

        Args:
            frames: Sequences, as for `infer_weights`, which also says what is raised.

        Returns:
            A Categorical over the K flows, batch ``[B]``.
        """
        return self.infer_weights(frames).factor()

    def schedule(self, weights: Tensor, t: Tensor | Sequence[float]) -> Schedule:
        """The control that applies weights ``[*batch, T, K, C]`` over the intervals between the times ``t [T+1]``.

        Args:
            weights: Weights of each interval, such as ``infer_weights(frames).mean``.
            t: Times of the frames, strictly monotone.

        Returns:
            A schedule for `transform`; the first and the last weights also act beyond the ends.

        Raises:
            ValueError: If there are not as many weights as intervals.
        """
        return sparse_schedule(weights, t)

    def forward(
        self,
        frames: Tensor,
        t: Tensor,
        k: Any = None,
        *,
        context: Context | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Terms:
        """The terms of the objective on a batch of sequences.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1].
            t: Times ``[T+1]``, in frames; or those of each sequence ``[B, T+1]``, monotone.
            k: Not looked at: training loops may hand over the transformations, and this model finds them by itself.
            context: Features of each sequence, as in `FlowFactorizedVAE`; the pair encoder does not see them.
            mask: Which frames were observed ``[B, T+1]``, as in `FlowFactorizedVAE`. In place of a missing one the pair
                encoder sees the last that was: what acted meanwhile shows in the interval before the next.
            generator: Source of all draws.

        Returns:
            The terms, batch means; ``kl_factor`` is the divergence of the weights.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
            FlowSolveError: If the solve fails.
        """
        given = self._checked(frames, t, context, mask)
        check_generator(generator, frames.device)
        warming = self.training and self.warming_up
        if warming:
            given = stretch(given, self.warmup_span, generator)
        share = len(given.t) / frames.shape[1]
        q = self.encode(given.frames[:, 0])
        z0 = objectives.draw(q, generator=generator)
        kl = objectives.start_divergence(q, self.prior, z0, 0).mean()
        solved = self._supposed(given, z0, share, generator) if warming else self._inferred(given, z0, generator)
        reconstruction, kl_factor, lesson = (part.mean() for part in solved[:3])
        found = {name: value.mean() for name, value in solved[3].items()}
        reconstruction = reconstruction / share
        if self.training and torch.is_grad_enabled():
            self.step += 1
        loss = self.kl_weight * kl + self.factor_weight * kl_factor - reconstruction + lesson + self._penalties(found)
        bound = reconstruction - kl - kl_factor
        return Terms(loss, reconstruction, kl, bound=bound, kl_factor=kl_factor, **found)

    def _inferred(self, given: Inputs, z0: Tensor, generator: torch.Generator | None) -> Solved:
        """What the flow that the inferred weights drive gives."""
        q, t, counted = self.infer_weights(given.frames), given.t, intervals_seen(given.mask)
        if self.training and torch.is_grad_enabled():
            q = q.in_units(follow_unit(self.unit, q, counted))
        drawn = q.rsample(temperature=self.spike_temperature, generator=generator)
        times = self._lazy(generator, z0.device)
        path = self._along(z0, t, drawn.weights, given.context, generator, self._costs(times))
        reconstruction = self._reconstruction(given, path.z, generator)
        first, each = drawn.weights[:, 0, :, 0], flattened(drawn.weights)
        found = self._regularizers(path, z0, first, t, times, given.context, generator, each)
        found |= self._tied(given, path.z, generator)
        return reconstruction, self.weights_prior.kl(q, counted), torch.zeros_like(reconstruction), found

    def _along(
        self,
        z0: Tensor,
        t: Tensor,
        weights: Tensor,
        context: Context | None,
        generator: torch.Generator | None,
        costs: Mapping[str, Any] | None = None,
    ) -> FlowPath:
        """The path under weights ``[*batch, T, K, C]`` of the intervals between times ``[T+1]`` or ``[T+1, *batch]``."""
        named: dict[str, Any] = {"context": context, "costs": costs, "generator": generator}
        if t.ndim > 1:
            return follow_intervals(self._flow_for, z0, t, weights, **named)
        control = self.schedule(weights, t)
        return self._flow_for(control)(z0, t, control, **named)

    def _supposed(self, given: Inputs, z0: Tensor, share: float, generator: torch.Generator | None) -> Solved:
        """The same with one flow acting alone, drawn by balanced responsibilities; and the spikes' lesson."""
        flows, t = self.num_flows, given.t
        with torch.no_grad():
            every = self._judge(given, z0, generator)
            on = self.weights_prior.marginals(len(t) - 1).mean(0)
            odds = torch.cat([on / (1 - on), on.new_ones(every.shape[-1] - flows)])  # of one flow alone against none
            prior = odds / odds.sum()
            # Shorter stretches differ by less: temperatures are meant for a whole sequence.
            tau = share * anneal(self.warmup_temperature, int(self.step), self.warmup_steps)
            r = balanced_responsibilities(-every, tau, prior, iterations=20)
            drawn = torch.multinomial(r, 1, generator=generator).squeeze(-1)
            information = (torch.special.xlogy(r, r) - r * prior.log()).sum(-1)
        acts, k = drawn < flows, drawn.clamp(max=flows - 1)
        times = self._lazy(generator, z0.device)
        path = self.flow(z0, t, k, context=given.context, costs=self._costs(times), generator=generator)
        # With no flow at all the state stays where it is, and there is nothing to regularize.
        z = torch.where(acts.unsqueeze(-1), path.z, z0)
        reconstruction = self._reconstruction(given, z, generator)
        regularizers = self._regularizers(path, z0, k, t, times, given.context, generator)
        found = {name: acts * value for name, value in regularizers.items()} | self._tied(given, z, generator)
        logits = self.pair_encoder(given.frames).spike_logits
        target = r[:, :flows].unsqueeze(-2).expand_as(logits)
        lesson = binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)
        counted = intervals_seen(given.mask)
        lesson = (lesson if counted is None else counted * lesson).sum(-1)
        return reconstruction, information, lesson, found

    def _judge(self, given: Inputs, z0: Tensor, generator: torch.Generator | None) -> Tensor:
        """E ln p of each sequence under every flow alone, and under none where stretches are looked at, [B, K or K+1]."""
        flow, row = self._every_flow(given.frames)
        t, context = given.rows(row)
        states = self.flow(z0[row], t, flow, context=context, generator=generator).z
        if self.warmup_span is not None:
            states = torch.cat([states, z0.expand(len(t), *z0.shape)], 1)
        return self._fit(given, states, 1, generator)

    def _flow_for(self, control: Control) -> LatentFlow:
        """The flow itself, or its view with 2K weights where a control holds those."""
        return flow_for(self.flow, control, self.controls)

    def _checked(self, frames: Tensor, t: Tensor, context: Context | None = None, mask: Tensor | None = None) -> Inputs:
        given = super()._checked(frames, t, context, mask)
        if len(given.t) < 2:
            raise ValueError("a sequence needs at least two frames: weights are inferred from neighbouring pairs")
        return replace(given, frames=given.shown())

    def log_likelihood(
        self,
        frames: Tensor,
        t: Tensor,
        k: Any = None,
        samples: int = 64,
        *,
        context: Context | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        chunk: int = 8,
    ) -> Tensor:
        r"""The importance-weighted bound (Burda et al., ICLR 2016, eq. 8) of $\ln p(x_{0..T})$, with z_0 and g latent.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1].
            t: Times, as for a call of the model.
            k: Not looked at.
            samples: S, the number of importance samples.
            context: As for a call of the model.
            mask: As for a call of the model.
            generator: Source of the draws.
            chunk: Samples decoded at a time, to bound memory.

        Returns:
            Bounds ``[B]``, in nats per sequence.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If ``samples`` is not positive or an argument does not fit.
        """
        check_count("samples", samples)
        given = self._checked(frames, t, context, mask)
        frames, mask, counted = given.frames, given.mask, intervals_seen(given.mask)
        q, q_g = self.encode(frames[:, 0]), self.infer_weights(frames)
        weights: list[Tensor] = []
        for size in objectives.chunks(samples, chunk):
            z0 = objectives.draw(q, (size,), generator)
            drawn = q_g.sample((size,), generator=generator)
            path = self._along(z0, given.repeated(size), drawn.weights, given.context, generator)
            each = [self.decoder(z).log_prob(x) for z, x in zip(path.z, frames.unbind(1), strict=True)]
            log_p = sum(each) if mask is None else sum(seen * p for seen, p in zip(mask.unbind(1), each, strict=True))
            log_ratio = objectives.path_log_ratio(q, self.prior, path, 0)
            log_odds = self.weights_prior.log_prob(drawn, counted) - q_g.log_prob(drawn, counted)
            weights.append(log_p - log_ratio + log_odds)
        return objectives.log_mean_exp(weights)
