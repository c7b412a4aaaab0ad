"""The flow-factorized variational autoencoder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from flowfactor import objectives
from flowfactor._checks import check_count
from flowfactor._config import describe, named
from flowfactor.context import Context
from flowfactor.control import Control
from flowfactor.latent_flow import LatentFlow
from flowfactor.models.base import FlowModel
from flowfactor.models.checks import check_batch_control, check_generator
from flowfactor.models.estimators import FactorBatch, FactorEstimator, check_factor_prior, factor_divergence
from flowfactor.models.inputs import Inputs, check_mask, last_observed
from flowfactor.models.reference import Begin, check_reference, frame_at, reference_frame
from flowfactor.models.terms import SequenceTerms, Terms
from flowfactor.path import FlowPath
from flowfactor.priors import Prior


class FlowFactorizedVAE(FlowModel):
    r"""A sequence model in which each transformation is a latent flow (Song et al., NeurIPS 2023).

    An encoder gives q(z_0|x_0), the flow of transformation k carries z_0 to z_1, z_2, ..., and a decoder gives
    p(x_t|z_t). Trained by one of the bounds of `flowfactor.objectives`, plus the squared Hamilton-Jacobi residual
    (mean over time) and the squared speed at the start, which ask the flow for dynamic optimal transport, and what else
    has a weight.

    With a ``factor_encoder`` k need not be known (weak supervision): q(k|x_0..x_T) is inferred for each sequence, and
    its divergence from p(k) added. What a learned flow does is then up to the training: the numbering is arbitrary.

    Args:
        encoder: Maps frames ``[*batch, C, H, W]`` to a distribution of latents with event ``[D]``.
        decoder: Maps latents ``[*batch, D]`` to a distribution of frames, and by ``decoder.mean`` to frames in [0, 1].
        flow: The latent flow, with K flows.
        prior: The prior, or prior path, of the latents; standard normal where None.
        objective: ``"path"``, ``"marginal"``, the name of a registered one (or a mapping with the name and settings), or a
            `flowfactor.objectives.Objective`.
        kl_weight: Weight of the divergence; 1 for a true bound.
        hj_weight: Weight of the Hamilton-Jacobi residual; 0 leaves it out. Fields without potential have none.
        start_weight: Weight of the squared speed at the start; 0 leaves it out.
        solenoidal_weight: Weight of the squared speed that is not the gradient of the potential, mean over time
            (`flowfactor.regularizers.Solenoidal`), which has a Helmholtz field flow along its potential; 0 leaves it out.
        acceleration_weight: Weight of the squared acceleration, mean over time (`flowfactor.regularizers.Acceleration`),
            which straightens the paths of any field; 0 leaves it out.
        code_weight: Weight of the squared distance between the path at another frame of each sequence, drawn at random, and
            the code of that frame (`flowfactor.regularizers.LatentEquivariance`): codes then follow their flow, whichever
            frame is encoded; 0 leaves it out. It counts in every step, whatever ``regularize_every``.
        commutator_weight: Weight of $|[v_i, v_j]|^2$ (`flowfactor.regularizers.Commutator`), which asks flows to commute, at
            the states of the frames, mean over these and pairs; one pair and frame a step, drawn. 0 leaves it out.
        error_weight: Weight of the squared error estimate of a step of bosh3 over one frame, mean over time
            (`flowfactor.regularizers.SolverError`), which makes flows cheap to solve; one step a sequence in training, at a
            frame that is drawn. 0 leaves it out.
        bending_weight: Weight of the squared second differences of a path's frames, mean over time
            (`flowfactor.regularizers.Bending`), which straightens paths as ``acceleration_weight`` does and evaluates
            nothing for it; 0 leaves it out.
        relative_weights: Whether these weights are relative to the size of the likelihood: they then count C H W times, the
            values of a frame, so that one weight serves frames of any size (0.1 is 235 for 28 x 28 in colour, and 1,229 for
            64 x 64).
        force: The force f of the Hamilton-Jacobi equation: ``"negative_square"`` for a learned one, None for f = 0, or
            a module f(z, t).
        frames_per_step: How many frames of a sequence to decode in a training step, drawn anew each time and weighted
            so that the bound stays unbiased; None for all.
        regularize_every: In one of how many training steps, drawn at random, to take the regularizers; they then count as
            many times, so that the loss stays unbiased (lazy regularization: Karras et al., CVPR 2020, section 3.1). Such a
            step's gradient is that many times as large: with weights of 100 or more leave it at 1, or training suffers.
        factor_encoder: Maps sequences ``[B, T+1, C, H, W]`` to a Categorical over K, such as
            `flowfactor.encoders.FactorEncoder`; None where k is always given.
        factor_prior: p(k), ``[K]``; uniform where None.
        estimator: How the expectation over q(k|x) is taken: ``"balanced"``, ``"gumbel"``, ``"enumerate"`` or the name of a
            registered one, a mapping with the name and settings, or a `FactorEstimator`. Without ``factor_encoder`` it has
            no effect.
        reference: Which frame of a sequence is encoded in training, and begins the path: ``"first"``, or ``"random"``, one
            drawn anew in every step (of all sequences, or where frames are missing of each), from which the others are
            reached both ways. The encoder then learns every frame, and the flow its way back. In ``eval()`` mode the first.

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

    _parts = (*FlowModel._parts, "objective")
    _settings = (
        "kl_weight", "hj_weight", "start_weight", "solenoidal_weight", "acceleration_weight", "code_weight",
        "commutator_weight", "error_weight", "bending_weight", "relative_weights", "frames_per_step",
        "regularize_every", "reference",
    )  # fmt: skip

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        flow: LatentFlow,
        prior: Prior | None = None,
        *,
        objective: objectives.Objective | str | Mapping[str, Any] = "path",
        kl_weight: float = 1.0,
        hj_weight: float = 1.0,
        start_weight: float = 1.0,
        solenoidal_weight: float = 0.0,
        acceleration_weight: float = 0.0,
        code_weight: float = 0.0,
        commutator_weight: float = 0.0,
        error_weight: float = 0.0,
        bending_weight: float = 0.0,
        relative_weights: bool = False,
        force: nn.Module | Literal["negative_square"] | None = "negative_square",
        frames_per_step: int | None = None,
        regularize_every: int = 1,
        factor_encoder: nn.Module | None = None,
        factor_prior: Sequence[float] | None = None,
        estimator: FactorEstimator | str | Mapping[str, Any] = "balanced",
        reference: Literal["first", "random"] = "first",
    ) -> None:
        bound = named(objectives.Objective, objective)
        super().__init__(
            encoder, decoder, flow, kl_weight=kl_weight, hj_weight=hj_weight, start_weight=start_weight,
            solenoidal_weight=solenoidal_weight, acceleration_weight=acceleration_weight, code_weight=code_weight,
            commutator_weight=commutator_weight, error_weight=error_weight, bending_weight=bending_weight,
            relative_weights=relative_weights, frames_per_step=frames_per_step, regularize_every=regularize_every,
        )  # fmt: skip
        self.objective, self.reference = bound, check_reference(reference, bound)
        self._set_prior(prior)
        self._set_force(force)
        self._set_factor(factor_encoder, factor_prior, estimator)

    def _set_factor(
        self,
        factor_encoder: nn.Module | None,
        factor_prior: Sequence[float] | None,
        estimator: FactorEstimator | str | Mapping[str, Any],
    ) -> None:
        made = FactorEstimator.build(estimator)
        flows = getattr(factor_encoder, "num_flows", self.num_flows)
        if flows != self.num_flows:
            raise ValueError(f"the factor_encoder tells {flows} flows apart and the flow has {self.num_flows}")
        if factor_encoder is None and factor_prior is not None:
            raise ValueError("factor_prior needs a factor_encoder: where k is given it has no effect")
        self.factor_encoder = factor_encoder
        self.estimator = None if factor_encoder is None else made
        log_prior = None if factor_encoder is None else check_factor_prior(factor_prior, self.num_flows)
        self.factor_prior = None if factor_prior is None else [float(p) for p in factor_prior]
        self._factor_log_prior: Tensor | None
        self.register_buffer("_factor_log_prior", log_prior, persistent=False)  # the settings hold it

    @property
    def supervision(self) -> Literal["full", "weak"]:
        """``"weak"`` where q(k|x) can be inferred, else ``"full"``: k has to be given."""
        return "full" if self.factor_encoder is None else "weak"

    def infer_factor(self, frames: Tensor, *, mask: Tensor | None = None) -> Categorical:
        """The posterior q(k|x_0..x_T) over which flow acts.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1].
            mask: Which frames were observed ``[B, T+1]``; in place of the others it sees the last that was. None for all.

        Returns:
            A Categorical over the K flows with batch shape ``[B]``.

        Raises:
            TypeError: If frames are no floats.
            ValueError: If the model has no factor encoder, or the frames do not fit it.

        Example:
            >>> import torch, flowfactor as ff
            >>> model = ff.models.build_vae((1, 8, 8), 2, 4, hidden=(8, 8), supervision="weak", num_frames=5)
            >>> model.infer_factor(torch.rand(6, 5, 1, 8, 8)).probs.shape
            torch.Size([6, 2])
        """
        if self.factor_encoder is None:
            raise ValueError(
                "this model has no factor encoder to infer k with: give k, or make it with factor_encoder=... "
                '(build_vae: supervision="weak")'
            )
        if mask is not None:
            check_mask(mask, frames)
            frames = last_observed(frames, mask)
        return self.factor_encoder(frames)

    def forward(
        self,
        frames: Tensor,
        t: Tensor,
        k: Control | None = None,
        *,
        context: Context | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Terms:
        """The terms of the objective on a batch of sequences.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1].
            t: Times ``[T+1]``, in frames; the prior starts at time 0. Or those of each sequence ``[B, T+1]``, monotone, and
                free to repeat.
            k: Which transformation acts: an int, one index a sequence ``[B]``, weights or a schedule. None infers it for
                each sequence; the terms are then expectations over q(k|x), or draws of them: by q(k|x) (Gumbel), or by
                responsibilities (balanced, while it anneals).
            context: Features of each sequence ``[B, C]``, or ``[C]`` for all, which steer the flow of a model built with
                ``context=C``; or such a tensor for each name.
            mask: Which frames were observed ``[B, T+1]``, the first of each sequence among them. The others are never read,
                and count for nothing; after its last observed frame a sequence rests. None where all were.
            generator: Source of all draws.

        Returns:
            The terms, batch means.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit, or k is None and the model has no factor encoder.
            FlowSolveError: If the solve fails.
        """
        given = self._checked(frames, t, context, mask)
        self._check_counts_masks("divergence", given)
        check_generator(generator, given.frames.device)
        if k is None:
            return self._inferred(given, generator).mean()
        check_batch_control(k, len(given.frames))
        return self._solved(given, k, self._begin(given, k, generator), generator).mean()

    def _check_counts_masks(self, method: str, given: Inputs) -> None:
        """Refuses missing frames where an objective does not say what they count."""
        work = getattr(self.objective, method)
        if given.mask is not None and "mask" not in inspect.signature(work).parameters:
            raise ValueError(
                f"the objective {self.objective} does not say what a missing frame counts: give the method {method} of "
                f"{type(self.objective).__name__} the argument mask=None, which holds True where a frame was observed"
            )

    def _inferred(self, given: Inputs, generator: torch.Generator | None) -> SequenceTerms:
        """The terms where k is inferred, by the estimator in training and exactly elsewhere."""
        log_q = self.infer_factor(given.shown()).logits
        estimator, log_prior = self.estimator, self._factor_log_prior
        assert estimator is not None and log_prior is not None
        begin = self._begin(given, 0, generator)  # p(z_0) is that of every flow
        batch = FactorBatch(
            log_q,
            log_prior,
            generator,
            under=lambda k: self._solved(given, k, begin, generator),
            every=lambda log_q: self._all_flows(given, log_q, begin, generator),
            judged=lambda wanted: self._judge(given, begin, wanted, generator),
        )
        if not self.training:
            return batch.expected(log_q)
        terms = estimator.expectation(batch)
        if torch.is_grad_enabled():
            estimator.advance()
        return terms

    def _judge(self, given: Inputs, begin: Begin, wanted: int | None, generator: torch.Generator | None) -> Tensor:
        """Minus the bound of every sequence under every flow, from a few frames each and without regularizers, [B, K]."""
        flow, row = self._every_flow(given.frames)
        path, kl = self._path(given, begin, flow, generator, row)
        return self.kl_weight * kl.reshape(self.num_flows, -1).mT - self._fit(
            given, path.z, wanted, generator, begin.frame
        )

    def _all_flows(
        self, given: Inputs, log_q: Tensor, begin: Begin, generator: torch.Generator | None
    ) -> SequenceTerms:
        """Every sequence under every flow that q does not rule out, [B, K]: one solve, and one decoding."""
        flow, row = log_q.T.isfinite().nonzero(as_tuple=True)  # sorted by flow
        return self._solved(given, flow, begin, generator, row).table(row, flow, log_q.shape)

    def _begin(self, given: Inputs, k: Control, generator: torch.Generator | None) -> Begin:
        """Encodes the reference frames, and draws what the flows of one sequence share."""
        frame = reference_frame(given, generator) if self.training and self.reference == "random" else 0
        q = self.encode(frame_at(given.frames, frame))
        z = objectives.draw(q, generator=generator)
        return Begin(z, self.objective.begin(q, self.prior, z, k), frame)

    def _solved(
        self,
        given: Inputs,
        k: Control,
        begin: Begin,
        generator: torch.Generator | None,
        row: Tensor | None = None,
    ) -> SequenceTerms:
        """What each solve gives: of every sequence under its k, or of the sequences ``row [N]`` under ``k [N]``."""
        times = self._lazy(generator, given.frames.device)
        path, kl = self._path(given, begin, k, generator, row, self._costs(times))
        reconstruction = self._reconstruction(given, path.z, generator, row)
        t, context = given.rows(row)
        found = self._regularizers(path, path.z[0], k, t, times, context, generator)
        found |= self._tied(given, path.z, generator, row, begin.frame)
        loss = -reconstruction + self.kl_weight * kl + self._penalties(found)
        return SequenceTerms(loss, reconstruction, kl, kl_factor=torch.zeros_like(kl), **found)

    def _path(
        self,
        given: Inputs,
        begin: Begin,
        k: Control,
        generator: torch.Generator | None,
        row: Tensor | None = None,
        costs: Mapping[str, Any] | None = None,
    ) -> tuple[FlowPath, Tensor]:
        """One solve, of the sequences ``row`` where given, and the divergence of its latents from the prior, [N]."""
        begin, (t, context), asked = begin.rows(row), given.rows(row), self.objective.log_det
        more = {"start": begin.frame, "context": context, "log_det": asked, "costs": costs, "generator": generator}
        path = self.flow(begin.z, t, k, **more)
        return path, self.objective.divergence(begin.start, self.prior, path, t, k, **given.seen(row))

    def config(self) -> dict[str, Any]:
        """How the model was made, as JSON values; parts of the user's own appear as None."""
        written = super().config()
        if self.factor_encoder is not None and self.estimator is not None:
            written["parts"] |= {name: describe(getattr(self, name)) for name in ("factor_encoder", "estimator")}
            written["settings"]["factor_prior"] = self.factor_prior
        return written

    def log_likelihood(
        self,
        frames: Tensor,
        t: Tensor,
        k: Control | None = None,
        samples: int = 64,
        *,
        context: Context | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        chunk: int = 8,
    ) -> Tensor:
        r"""The importance-weighted bound (Burda et al., ICLR 2016, eq. 8) of each sequence.

        Under ``path`` it bounds $\ln p(x_{0..T}|k)$, with $z_0$ as the one latent whatever the ``reference``; under
        ``marginal`` it bounds $\sum_t \ln p_t(x_t|k)$. It grows with ``samples`` towards the log-likelihood. Where
        k is None, the bound is the expectation of these over q(k|x), less $KL[q(k|x) \,|\, p(k)]$.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1].
            t: Times ``[T+1]``, in frames, or those of each sequence ``[B, T+1]``.
            k: Which transformation acts; None infers it.
            samples: S, the number of importance samples.
            context: Features of each sequence, as for a call of the model.
            mask: Which frames were observed ``[B, T+1]``; the bound is that of these.
            generator: Source of the draws.
            chunk: Samples decoded at a time, to bound memory.

        Returns:
            Bounds ``[B]``, in nats per sequence.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If ``samples`` is not positive, an argument does not fit, or the objective has no importance weights.
        """
        check_count("samples", samples)
        given = self._checked(frames, t, context, mask)
        self._check_counts_masks("log_weights", given)
        q = self.encode(given.frames[:, 0])
        if k is not None:
            check_batch_control(k, len(given.frames))
            return self._importance(given, k, q, samples, generator, chunk)
        q_k = self.infer_factor(given.shown())
        each = [self._importance(given, i, q, samples, generator, chunk) for i in range(self.num_flows)]
        assert self._factor_log_prior is not None
        return (q_k.probs * torch.stack(each, -1)).sum(-1) - factor_divergence(q_k.logits, self._factor_log_prior)

    def _importance(
        self,
        given: Inputs,
        k: Control,
        q: Distribution,
        samples: int,
        generator: torch.Generator | None,
        chunk: int,
    ) -> Tensor:
        """The bound under one control."""
        weights: list[Tensor] = []
        for size in objectives.chunks(samples, chunk):
            z0 = objectives.draw(q, (size,), generator)
            t, asked = given.repeated(size), self.objective.log_det
            path = self.flow(z0, t, k, context=given.context, log_det=asked, generator=generator)
            # [T+1, S, B]: frames against every sample's decoded path.
            each = [self.decoder(z).log_prob(x) for z, x in zip(path.z, given.frames.unbind(1), strict=True)]
            log_p, seen = torch.stack(each), given.seen()
            if seen:
                log_p = torch.where(seen["mask"].unsqueeze(1), log_p, 0)
            weights.append(self.objective.log_weights(log_p, q, self.prior, path, given.t, k, **seen))
        return objectives.log_mean_exp(weights).sum(0)
