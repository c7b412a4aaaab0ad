"""What models share: encoding and decoding frames, and what comes with a latent flow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.distributions import Distribution

from flowfactor import objectives
from flowfactor._checks import check_count, check_optional_count
from flowfactor.context import Context, ContextSize
from flowfactor.control import Control
from flowfactor.latent_flow import LatentFlow
from flowfactor.models.checks import (
    check_commutator,
    check_flow_parts,
    check_force,
    check_latent_size,
    check_relative,
    check_running_costs,
    check_same_rest,
    check_weight,
)
from flowfactor.models.inputs import Inputs, beside, check_inputs, clock
from flowfactor.models.pretrained import PretrainedMixin
from flowfactor.models.protocols import infers_k, knows_transformations
from flowfactor.models.reference import without
from flowfactor.models.step_error import step_error
from flowfactor.models.tie import code_error
from flowfactor.path import FlowPath
from flowfactor.priors import Augmented, Prior, StandardNormal
from flowfactor.regularizers import (
    Acceleration,
    Bending,
    Commutator,
    HamiltonJacobi,
    NegativeSquare,
    Solenoidal,
    SolverError,
    StartAtRest,
)


class FrameDecoder(Protocol):
    """What a model asks of its decoder, apart from being a module."""

    def __call__(self, z: Tensor, /) -> Distribution:
        """The distribution of frames given latents ``[*batch, D]``."""
        ...

    def mean(self, z: Tensor, /) -> Tensor:
        """The mean frames of latents ``[*batch, D]``, in [0, 1]."""
        ...


class Autoencoder(PretrainedMixin, nn.Module):
    """Base of the models: an encoder and a decoder of frames."""

    encoder: nn.Module
    decoder: nn.Module
    supervision: Literal["full", "weak", "none"] = "full"
    has_transformation: bool = True

    def encode(self, x: Tensor) -> Distribution:
        """The posterior q(z|x) of frames ``[*batch, C, H, W]``: a distribution with event ``[D]``.

        The encoder of a model with a flow is trained on the frames that its paths begin with, the first of each sequence as
        a rule. What it says of others is left to chance, unless it is trained on them too, as by ``code_weight``.

        The first `code_dim` dimensions are the code of the frame. Those that may follow are room at rest, which says nothing
        of it: the latent has them since a flow writes them and the decoder reads them.
        """
        return self.encoder(x)

    @property
    def code_dim(self) -> int | None:
        """How many dimensions of a latent, the first, the encoder writes; None where it does not say."""
        return getattr(self.encoder, "code_dim", getattr(self.encoder, "latent_dim", None))

    def decode(self, z: Tensor) -> Tensor:
        """The mean frames of latents ``[*batch, D]``, in [0, 1], ``[*batch, C, H, W]``."""
        return cast(FrameDecoder, self.decoder).mean(z)

    def loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> Tensor:
        """The loss of a batch as data sets give it: of its frames at its times, with all else that it holds.

        Args:
            batch: ``"frames"``, ``"t"`` and ``"k"``, and where the data have them ``"context"`` and ``"mask"``. A model that
                infers k, or has no use for it, is not shown it.
            generator: Source of all draws.

        Returns:
            The loss, a scalar.

        Raises:
            KeyError: If there are no frames or times.
            TypeError: As a call of the model.
            ValueError: As a call of the model.

        Example:
            >>> import torch, flowfactor as ff
            >>> data = ff.data.Sequences(torch.rand(6, 4, 8, 8), k=[0, 1] * 3, context=torch.rand(6, 2))
            >>> model = ff.models.build_vae(data.image_shape, 2, 4, context=2, hidden=(8, 8))
            >>> model.loss(data.batch([0, 1, 2])).backward()
        """
        k = batch.get("k") if knows_transformations(self) and not infers_k(self) else None
        also = beside(batch, "context", "mask")
        return self(batch["frames"], batch["t"], k, generator=generator, **also).loss

    @property
    def _frame_shape(self) -> tuple[int, ...] | None:
        """(C, H, W); None where the decoder does not say."""
        return getattr(self.decoder, "event_shape", None)


class FlowModel(Autoencoder):
    """Base of the models with a latent flow.

    A constructor calls this one, then registers its prior and what else it has, and last its force. The order of the
    modules stays as it is: by it the checkpoints of an optimizer know the parameters.
    """

    _parts = ("encoder", "decoder", "flow", "prior", "force")
    prior: Prior

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        flow: LatentFlow,
        *,
        kl_weight: float,
        hj_weight: float,
        start_weight: float,
        solenoidal_weight: float = 0.0,
        acceleration_weight: float = 0.0,
        code_weight: float = 0.0,
        commutator_weight: float = 0.0,
        error_weight: float = 0.0,
        bending_weight: float = 0.0,
        relative_weights: bool = False,
        frames_per_step: int | None,
        regularize_every: int,
    ) -> None:
        super().__init__()
        check_flow_parts(encoder, decoder, flow)
        self.encoder, self.decoder, self.flow = encoder, decoder, flow
        self.kl_weight = check_weight("kl_weight", kl_weight)
        self.hj_weight = check_weight("hj_weight", hj_weight)
        self.start_weight = check_weight("start_weight", start_weight)
        self.solenoidal_weight = check_weight("solenoidal_weight", solenoidal_weight)
        self.acceleration_weight = check_weight("acceleration_weight", acceleration_weight)
        self.code_weight = check_weight("code_weight", code_weight)
        self.commutator_weight = check_weight("commutator_weight", commutator_weight)
        self.error_weight = check_weight("error_weight", error_weight)
        self.bending_weight = check_weight("bending_weight", bending_weight)
        check_running_costs(flow, self.solenoidal_weight, self.acceleration_weight)
        check_commutator(flow, self.commutator_weight)
        self.relative_weights = check_relative(relative_weights, self._frame_shape)
        self.frames_per_step = check_optional_count("frames_per_step", frames_per_step)
        self.regularize_every = check_count("regularize_every", regularize_every)

    def _set_prior(self, prior: Prior | None) -> None:
        """Registers the prior of the latents; standard normal where None, with the encoder's room at rest."""
        check_latent_size("prior", prior, self.flow.dim)
        rest = getattr(self.encoder, "at_rest", None)
        default = Augmented(StandardNormal(self.code_dim), *rest) if rest else StandardNormal(self.flow.dim)
        self.prior = default if prior is None else prior
        check_same_rest(self.encoder, self.prior)

    def _set_force(self, force: nn.Module | str | None) -> None:
        """Registers the regularizers, with the force of the Hamilton-Jacobi equation."""
        check_force(force)
        # A learned force that nothing trains would be a dead parameter.
        learned = NegativeSquare(self.flow.dim) if isinstance(force, str) and self.penalised else None
        self.hamilton_jacobi = HamiltonJacobi(learned if isinstance(force, str) else force)
        self._start_at_rest, self._solenoidal, self._acceleration = StartAtRest(), Solenoidal(), Acceleration()
        self._commutator, self._solver_error, self._bending = Commutator(draw=1), SolverError(), Bending()

    @property
    def num_flows(self) -> int:
        """K, the number of flows."""
        return self.flow.num_flows

    @property
    def code_dim(self) -> int:
        """How many dimensions of a latent, the first, the encoder writes: all but those of the room at rest."""
        return getattr(self.encoder, "code_dim", self.flow.dim)

    @property
    def context(self) -> ContextSize:
        """C, the number of features of the context that steers the flow, or a number for each name; 0 for none."""
        return self.flow.field.context_size

    @property
    def force(self) -> Any:
        """The force of the Hamilton-Jacobi equation, or None."""
        return self.hamilton_jacobi.force

    @property
    def penalty_unit(self) -> float:
        """What a weight of 1 counts for in the loss: 1, or C H W, the values of a frame, with ``relative_weights``.

        A log-likelihood is a sum over the values of a frame, and grows with them; latent speeds do not.
        """
        return float(math.prod(self._frame_shape or ())) if self.relative_weights else 1.0

    @property
    def penalised(self) -> bool:
        """Whether the Hamilton-Jacobi residual is part of the loss."""
        return self.hj_weight > 0 and self.flow.field.has_potential

    @property
    def _weights(self) -> dict[str, float]:
        """The weights of the regularizers, by the names of their terms; 0 for those that are left out."""
        return {
            "hj": self.hj_weight if self.penalised else 0.0,
            "start": self.start_weight,
            "solenoidal": self.solenoidal_weight,
            "acceleration": self.acceleration_weight,
            "code": self.code_weight,
            "commutator": self.commutator_weight,
            "solver_error": self.error_weight,
            "bending": self.bending_weight,
        }

    def transform(
        self, x0: Tensor, t: Tensor | Sequence[float], control: Control = 0, *, context: Context | None = None
    ) -> Tensor:
        """Transforms images along the latent flows, from the mean of their posterior.

        The images should be of the kind that was encoded in training: first frames of sequences, or, by
        ``FlowFactorizedVAE(reference="random")``, any of their frames, with the time that it has there as ``t[0]``.

        Args:
            x0: Images at ``t[0]``, ``[B, C, H, W]``.
            t: Times ``[T]`` in frames, strictly monotone; backwards undoes a transformation. Or those of each image,
                ``[B, T]``, monotone, which may repeat.
            control: Which flow acts: an int, one index per image, weights ``[B, K]`` to superpose, or a `Schedule`. A
                `SparseTransformationVAE` has flows at their typical strength, and under double control also weights
                ``[B, 2K]``, those of the gradient part first.
            context: Features of each image ``[B, C]``, or ``[C]`` for all, for a model built with ``context=C``; or such a
                tensor for each name.

        Returns:
            Frames ``[B, T, C, H, W]``, the first the reconstruction of ``x0``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
            FlowSolveError: If the solve fails.
        """
        when = clock(t, x0, 3)
        return self.decode(self.path(self.encode(x0).mean, when, control, context=context)).movedim(0, x0.ndim - 3)

    def path(
        self, z0: Tensor, t: Tensor | Sequence[float], control: Control = 0, *, context: Context | None = None
    ) -> Tensor:
        """Latents ``[T, *batch, D]`` along the flows, from ``z0 [*batch, D]``; control and context as for `transform`.

        Times are ``[T]``, or ``[T, *batch]`` where each latent has its own: time first, as in all paths.
        """
        return self._flow_for(control)(z0, t, control, context=context).z

    def _flow_for(self, control: Control) -> LatentFlow:
        """The flow that follows a control."""
        return self.flow

    def _checked(self, frames: Tensor, t: Tensor, context: Context | None = None, mask: Tensor | None = None) -> Inputs:
        return check_inputs(self, frames, t, context, mask, self._frame_shape, self.context)

    def _lazy(self, generator: torch.Generator | None, device: torch.device) -> int:
        """What the regularizers count for in this step: 0 where it goes without, and more where it makes up for others.

        Drawn, not counted, so that a training that is resumed has nothing to remember.
        """
        every = self.regularize_every
        if every == 1 or not self.training or not any(self._weights.values()):
            return 1
        return every if int(torch.randint(every, (), generator=generator, device=device)) == 0 else 0

    def _costs(self, times: int) -> dict[str, Any]:
        """What a solve integrates for `_regularizers`."""
        running = {"hj": self.hamilton_jacobi, "solenoidal": self._solenoidal, "acceleration": self._acceleration}
        weights = self._weights
        return {name: cost for name, cost in running.items() if times and weights[name]}

    def _penalties(self, found: Mapping[str, Tensor]) -> Tensor:
        """What the regularizers add to the loss."""
        weighted = [weight * found[name] for name, weight in self._weights.items()]
        return self.penalty_unit * torch.stack(weighted).sum(0)

    def _regularizers(
        self, path: FlowPath, z0: Tensor, control: Control, t: Tensor, times: int, context: Context | None = None,
        generator: torch.Generator | None = None, weights: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The regularizers of each path, so many times: at the start, or in the mean over time; 0 where left out.

        The control is that of the start; where weights change at the frames, ``weights [N, T, K]`` has them all.
        """
        found = dict.fromkeys(self._weights, z0.new_zeros(z0.shape[:-1]))
        if len(t) > 1:
            span = (t[-1] - t[0]).abs()
            # A sequence of one observed frame takes no time, and has none.
            span = span if t.ndim == 1 else torch.where(span > 0, span, 1)
            found |= {name: times * path.costs[name][-1] / span for name in self._costs(times)}
            if times and self.bending_weight > 0:
                found["bending"] = times * self._bending(path.z, t, control) / span
        if times and self.start_weight > 0:
            found["start"] = times * self._start_at_rest(self.flow, z0, control, t[0], context=context)
        if times and self.commutator_weight > 0:
            found["commutator"] = times * self._commute(path.z, t, context, generator)
        if times and self.error_weight > 0 and len(t) > 1:
            flow = self.flow if weights is None else self._flow_for(weights)
            more = {"context": context, "weights": weights, "draw": self.training, "generator": generator}
            found["solver_error"] = times * step_error(self._solver_error, flow, path.z, t, control, **more)
        return found

    def _tied(
        self,
        given: Inputs,
        z: Tensor,
        generator: torch.Generator | None,
        row: Tensor | None = None,
        reference: int | Tensor = 0,
    ) -> dict[str, Tensor]:
        """What `code_weight` weighs, of paths ``z [T+1, N, D]``; without it no frame is encoded."""
        return {"code": code_error(self, given, z, generator, row, reference)} if self.code_weight else {}

    def _commute(self, z: Tensor, t: Tensor, context: Context | None, generator: torch.Generator | None) -> Tensor:
        """|[v_i, v_j]|^2 in the mean over pairs and states ``[T+1, N, D]``; of one pair and one frame in training."""
        if self.training:
            frame = int(torch.randint(len(z), (), generator=generator, device=z.device))
            return self._commutator(self.flow, z[frame], t[frame], context=context, generator=generator)
        when = (t if t.ndim > 1 else t.unsqueeze(-1)).expand(z.shape[:-1])
        return Commutator()(self.flow, z, when, context=context).mean(0)

    def _reconstruction(
        self, given: Inputs, z: Tensor, generator: torch.Generator | None, row: Tensor | None = None
    ) -> Tensor:
        """E ln p(x_t|z_t) summed over frames, of paths ``z [T+1, N, D]``; from a few frames in training."""
        wanted = self.frames_per_step if self.training else None
        return objectives.sequence_log_likelihood(self.decoder, given.frames, z, wanted, generator, row, given.mask)

    def _every_flow(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The flow and the sequence ``[K*B]`` of every pair of the two, sorted by flow."""
        flow = torch.arange(self.num_flows, device=frames.device)
        row = torch.arange(len(frames), device=frames.device)
        return flow.repeat_interleave(len(frames)), row.repeat(self.num_flows)

    def _fit(
        self, given: Inputs, z: Tensor, wanted: int | None, generator: torch.Generator | None, frame: int | Tensor = 0
    ) -> Tensor:
        """E ln p(x_t|z_t) of each sequence under each of F flows, ``[B, F]``, of states sorted by flow ``[T+1, F*B, D]``.

        From so many of the frames beside the one that was encoded: that one is the same under all flows.
        """
        first = isinstance(frame, int) and frame == 0
        begin, each = int(first and len(z) > 1), torch.arange(len(given.frames), device=given.frames.device)
        given = given.part(begin, len(z)) if first else without(given, frame)
        z = rearrange(z[begin:], "t (f b) d -> t b f d", b=len(each))
        frames = given.frames

        def log_p(index: Tensor) -> Tensor:
            # Flows ahead of sequences, so that frames are not copied for every flow.
            states = z[index, each].movedim(-2, 1)
            return self.decoder(states).log_prob(frames[each, index].unsqueeze(1))

        if given.mask is not None:
            index, weights = objectives.choose_observed_frames(given.mask, wanted, generator)
            return (weights.to(z).unsqueeze(1) * log_p(index)).sum(0).mT
        index, weight = objectives.choose_frames(frames.shape[1], wanted, len(frames), frames.device, generator)
        return weight * log_p(index).sum(0).mT
