"""TopographicVAE: latents in capsules that roll as the frames are transformed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from flowfactor import objectives
from flowfactor._checks import check_count, check_optional_count
from flowfactor.control import Control, travelled
from flowfactor.models.baselines.base import Baseline, Weigh
from flowfactor.models.checks import check_positive
from flowfactor.models.terms import Terms

# Keeps the square root away from 0, where all variables of a neighbourhood vanish.
_FLOOR = 1e-6


class TopographicVAE(Baseline):
    r"""A VAE with topographic Student-t latents in capsules that roll over time (Keller and Welling, NeurIPS 2021).

    Two encoders give normal posteriors of $z_l$ and $u_l$ for each frame, both with prior N(0, I), and the decoder sees

    $$s_l = \frac{z_l + \mu}{\sqrt{W u^2}}, \qquad
      (W u^2)_{l,c} = \sum_{|\delta| \le L} \sum_{|e| \le w} \mathrm{Roll}_{-\delta}(u_{l+\delta}^2)_{c+e}$$

    (their equations 6 and 9 to 11): scales are shared along the way that a feature takes when the capsule rolls by one
    place a frame, so that the capsules learn to roll with the transformation. Each s, times the root of the number of
    terms, is Student-t distributed if mu is 0. The bound is theirs (equation 13),
    $\sum_l E \ln p(x_l|s_l) - KL[q(z_l|x_l)|p(z_l)] - KL[q(u_l|x_l)|p(u_l)]$, a bound of the whole sequence.

    Transforming rolls the capsules of the first frame. Their sequences are cyclic; where ours end, the frame at the end
    stands in for those beyond, so that a single image is a sequence of one frame. Times need not be whole: capsules roll
    by fractions through linear interpolation.

    Their model uses no labels, and every capsule rolls in every sequence: an image alone cannot tell which
    transformation is to come. With ``supervised=True`` the capsules are dealt out to the K transformations; those of the
    acting one roll and the others stand still (the stationary grouping of their section 5), which gives ``control`` a
    meaning and the same labels as the supervised flow model has.

    Args:
        encoder: Gives q(z|x): maps frames ``[*batch, C, H, W]`` to independent normals with event ``[D]``.
        decoder: Maps latents s ``[*batch, D]`` to a distribution of frames.
        scale_encoder: Gives q(u|x), like the encoder.
        num_flows: K, how many transformations the data have.
        capsule_dim: Size of a capsule, a divisor of D; where None, the largest that leaves K capsules.
        window: L, in frames.
        spread: w, in places of a capsule.
        shift: Where the learned mu starts.
        supervised: Whether each transformation rolls capsules of its own.
        num_frames: Frames of a sequence. Where these are more than a capsule has places, it rolls by ``capsule_dim /
            num_frames`` places a frame instead of one, so as not to come round to where it began.
        frames_per_step: How many frames of a sequence to decode in a training step, weighted so that the bound stays
            unbiased; None for all. All frames are encoded.

    Raises:
        TypeError: If a part has no ``latent_dim``.
        ValueError: If a setting is out of range or sizes do not match.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_baseline("topographic-vae", (1, 8, 8), num_flows=2, latent_dim=8, supervised=True)
        >>> frames = torch.rand(6, 5, 1, 8, 8)
        >>> model(frames, torch.arange(5), torch.tensor([0, 0, 0, 1, 1, 1])).loss.backward()
        >>> model.transform(frames[:, 0], [0, 1, 2], control=1).shape
        torch.Size([6, 3, 1, 8, 8])
    """

    objective = "sequence"
    _parts = ("encoder", "decoder", "scale_encoder")
    _settings = ("num_flows", "capsule_dim", "window", "spread", "shift", "supervised", "num_frames", "frames_per_step")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        scale_encoder: nn.Module,
        num_flows: int = 1,
        *,
        capsule_dim: int | None = None,
        window: int = 3,
        spread: int = 1,
        shift: float = 30.0,
        supervised: bool = False,
        num_frames: int | None = None,
        frames_per_step: int | None = None,
    ) -> None:
        super().__init__(encoder, decoder, num_flows)
        if getattr(scale_encoder, "latent_dim", None) != self.latent_dim:
            raise ValueError(f"the scale_encoder must have latents of size {self.latent_dim}, as the encoder has")
        self.scale_encoder = scale_encoder
        self.capsule_dim = _capsule_dim(self.latent_dim, num_flows, capsule_dim)
        self.capsules = self.latent_dim // self.capsule_dim
        if supervised and self.capsules < num_flows:
            raise ValueError(f"{self.capsules} capsules cannot be dealt out to {num_flows} transformations")
        self.window = check_count("window", window, 0)
        self.spread = check_count("spread", spread, 0)
        if 2 * self.spread + 1 > self.capsule_dim:
            raise ValueError(f"a spread of {spread} on both sides exceeds a capsule of size {self.capsule_dim}")
        self.shift = check_positive("shift", shift) if shift else 0.0
        self.supervised = bool(supervised)
        self.num_frames = check_optional_count("num_frames", num_frames)
        self.speed = min(1.0, self.capsule_dim / (self.num_frames or 1))
        self.frames_per_step = check_optional_count("frames_per_step", frames_per_step)
        self.mu = nn.Parameter(torch.tensor(self.shift))

    def encode(self, x: Tensor) -> Distribution:
        """The posterior of s, each frame of ``[*batch, C, H, W]`` being a sequence of its own; it has no density."""
        return TopographicPosterior(self, self.encoder(x), self.scale_encoder(x))

    def latents(self, z: Tensor, u: Tensor, rolled: Tensor) -> Tensor:
        """The topographic latents of whole sequences.

        Args:
            z: Variables ``[N, *batch, D]``, frames first.
            u: Variables that make the scales ``[N, *batch, D]``.
            rolled: How far every capsule has rolled at each frame, ``[N, B, capsules]`` (broadcast against the batch).

        Returns:
            Latents s ``[N, *batch, D]``.
        """
        total = z.shape[0]
        squares = u.square().unflatten(-1, (self.capsules, self.capsule_dim))
        scale = torch.zeros_like(squares)
        here = torch.arange(total, device=z.device)
        for offset in range(-self.window, self.window + 1):
            there = (here + offset).clamp(0, total - 1)
            scale = scale + roll(squares[there], rolled - rolled[there])
        scale = sum((scale.roll(place, -1) for place in range(-self.spread, self.spread + 1)), torch.zeros_like(scale))
        return (z + self.mu) / (scale.flatten(-2) + _FLOOR).sqrt()

    def transform(
        self, x0: Tensor, t: Tensor | Sequence[float], control: Control = 0, *, context: None = None
    ) -> Tensor:
        """Transforms images by rolling capsules, from the means of their posterior.

        Args:
            x0: Images at ``t[0]``, ``[B, C, H, W]``.
            t: Times ``[T]`` in frames, strictly monotone; backwards undoes a transformation.
            control: Which transformation acts: an int, one index per image, weights ``[B, K]`` (how fast each rolls) or
                a `Schedule`. Without supervision all roll alike, whatever the control.
            context: Refused: a baseline knows none.

        Returns:
            Frames ``[B, T, C, H, W]``, the first the reconstruction of ``x0``.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
        """
        when = self._checked_transform(x0, t, control, context)
        start = self.encode(x0).mean.unflatten(-1, (self.capsules, self.capsule_dim))
        path = roll(start.expand(len(when), *start.shape), self._rolled(control, when, len(x0)))
        return self.decode(path.flatten(-2)).movedim(0, 1)

    def forward(self, frames: Tensor, t: Tensor, k: Control, *, generator: torch.Generator | None = None) -> Terms:
        """The terms of the objective on a batch of sequences.

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1].
            t: Times ``[T+1]``, in frames.
            k: Which transformation acts; ignored without supervision.
            generator: Source of all draws.

        Returns:
            The terms, batch means, in nats per sequence.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If an argument does not fit.
        """
        frames, t = self._checked(frames, t, k, generator)
        batch = len(frames)
        x = frames.movedim(1, 0)
        posteriors = self.encoder(x), self.scale_encoder(x)
        z, u = (objectives.draw(q, generator=generator) for q in posteriors)
        kl_z, kl_u = (
            objectives.start_divergence(q, self.prior, v, 0).sum(0) for q, v in zip(posteriors, (z, u), strict=True)
        )
        s = self.latents(z, u, self._rolled(k, t, batch))
        wanted = self.frames_per_step if self.training else None
        reconstruction = objectives.sequence_log_likelihood(self.decoder, frames, s, wanted, generator).mean()
        return Terms.plain(reconstruction, (kl_z + kl_u).mean())

    def _importance(self, frames: Tensor, t: Tensor, k: Control, generator: torch.Generator | None) -> Weigh:
        q_z, q_u, prior = self.encoder(frames), self.scale_encoder(frames), self.prior.at(0.0)
        rolled = self._rolled(k, t, len(frames)).unsqueeze(1)

        def weigh(size: tuple[int]) -> Tensor:
            z, u = objectives.draw(q_z, size, generator), objectives.draw(q_u, size, generator)
            s = self.latents(z.movedim(2, 0), u.movedim(2, 0), rolled).movedim(0, 2)  # [S, B, N, D]
            log_p = self.decoder(s).log_prob(frames) + prior.log_prob(z) + prior.log_prob(u)
            return (log_p - q_z.log_prob(z) - q_u.log_prob(u)).sum(-1)

        return weigh

    def _rolled(self, control: Control, t: Tensor, batch: int) -> Tensor:
        """How far every capsule has rolled, ``[N, B, capsules]``."""
        if not self.supervised:
            return self.speed * (t - t[0])[:, None, None].expand(len(t), batch, self.capsules)
        owner = torch.arange(self.capsules, device=t.device) % self.num_flows
        return self.speed * travelled(control, t, batch, self.num_flows)[..., owner]


class TopographicPosterior(Distribution):
    """The posterior of topographic latents of single frames: it has a mean and draws, and no density in closed form.

    Args:
        model: The model.
        z: Posterior of z, batch ``[*batch]`` and event ``[D]``.
        u: Posterior of u.
    """

    has_rsample = True

    def __init__(self, model: TopographicVAE, z: Distribution, u: Distribution) -> None:
        super().__init__(z.batch_shape, z.event_shape, validate_args=False)
        self._model, self._z, self._u = model, z, u

    @property
    def arg_constraints(self) -> dict[str, Any]:
        """None: there is nothing to check."""
        return {}

    @property
    def mean(self) -> Tensor:
        """The latents of the mean of z and the mean square of u, ``[*batch, D]``."""
        # The square of a mean near 0 says nothing of a scale: where the posterior is wide, the mean square does.
        return self._latents(self._z.mean, (self._u.mean.square() + self._u.variance).sqrt())

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws ``[*sample_shape, *batch, D]``, with gradients."""
        shape = torch.Size(sample_shape)
        return self._latents(self._z.rsample(shape), self._u.rsample(shape))

    def _latents(self, z: Tensor, u: Tensor) -> Tensor:
        still = z.new_zeros(1, *[1] * (z.ndim - 1), self._model.capsules)
        return self._model.latents(z.unsqueeze(0), u.unsqueeze(0), still)[0]


def roll(x: Tensor, shift: Tensor) -> Tensor:
    """Rolls capsules by real amounts, with linear interpolation between whole ones.

    Args:
        x: Capsules ``[..., C, d]``.
        shift: How far each rolls, ``[..., C]``, broadcast against x's leading dimensions.

    Returns:
        Capsules ``[..., C, d]``: with whole shifts, what stood at place i stands at place i + shift.

    Example:
        >>> roll(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([1.25]))
        tensor([[0.0000, 0.7500, 0.2500]])
    """
    size = x.shape[-1]
    whole = shift.floor()
    rest = (shift - whole).unsqueeze(-1)
    places = torch.arange(size, device=x.device) - whole.long().unsqueeze(-1)
    near = x.gather(-1, (places % size).expand_as(x))
    far = x.gather(-1, ((places - 1) % size).expand_as(x))
    return near + rest * (far - near)


def _capsule_dim(latent_dim: int, num_flows: int, given: int | None) -> int:
    if given is None:
        fitting = [d for d in range(1, latent_dim + 1) if latent_dim % d == 0 and latent_dim // d >= num_flows]
        if not fitting or fitting[-1] < 3:
            raise ValueError(
                f"latents of size {latent_dim} do not divide into {num_flows} capsules of at least 3: "
                "take a larger latent_dim, or give capsule_dim"
            )
        return fitting[-1]
    check_count("capsule_dim", given)
    if latent_dim % given:
        raise ValueError(f"capsule_dim must divide the size of the latents, {latent_dim}; got {given}")
    return given
