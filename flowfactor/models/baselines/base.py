"""What the baselines share: checks, files, and pieces of their bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from flowfactor import objectives
from flowfactor._checks import check_count
from flowfactor.control import Control, Schedule, resolve, times, travelled
from flowfactor.models.base import Autoencoder
from flowfactor.models.checks import check_batch_control, check_frames, check_generator
from flowfactor.models.inputs import refuse_beside
from flowfactor.priors import StandardNormal

Weigh = Callable[[tuple[int]], Tensor]


class Baseline(Autoencoder):
    """Base of the baselines: an encoder, a decoder and what else a model has, saved by names.

    Args:
        encoder: Maps frames ``[*batch, C, H, W]`` to a distribution of latents with event ``[D]``.
        decoder: Maps latents ``[*batch, D]`` to a distribution of frames, and by ``decoder.mean`` to frames in [0, 1].
        num_flows: K, how many transformations the data have.

    Raises:
        TypeError: If encoder or decoder has no ``latent_dim``, or ``num_flows`` is no integer.
        ValueError: If sizes do not match.
    """

    objective: ClassVar[str]
    """Name of the bound: ``frame``, ``chain``, ``sequence`` or ``path``."""

    _parts = ("encoder", "decoder")
    _settings = ("num_flows",)

    def __init__(self, encoder: nn.Module, decoder: nn.Module, num_flows: int) -> None:
        super().__init__()
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(getattr(part, "latent_dim", None), int):
                raise TypeError(f"the {name} must have a latent_dim, as those of flowfactor.encoders; got {part!r}")
        if encoder.latent_dim != decoder.latent_dim:
            raise ValueError(f"the encoder has latents of size {encoder.latent_dim}, the decoder {decoder.latent_dim}")
        self.encoder, self.decoder = encoder, decoder
        self.num_flows = check_count("num_flows", num_flows)
        self.prior = StandardNormal(self.latent_dim)

    def __call__(self, *arguments: Any, context: Any = None, mask: Any = None, **named: Any) -> Any:
        """Refuses a context and a mask, whatever ``forward`` takes beside them."""
        refuse_beside(self, context=context, mask=mask)
        return super().__call__(*arguments, **named)

    @property
    def latent_dim(self) -> int:
        """D, the size of a latent."""
        return self.encoder.latent_dim  # pyright: ignore[reportReturnType]

    def log_likelihood(
        self,
        frames: Tensor,
        t: Tensor,
        k: Control | None = None,
        samples: int = 64,
        *,
        context: None = None,
        mask: None = None,
        generator: torch.Generator | None = None,
        chunk: int = 8,
    ) -> Tensor:
        r"""The importance-weighted bound (Burda et al., ICLR 2016, eq. 8) of $\ln p(x_{0..T}|k)$.

        It is over the latents that the model has (`objective`): of every frame alone (``frame``), of a chain or a
        sequence of frames, or of the first frame, which a path carries on (``path``).

        Args:
            frames: Sequences ``[B, T+1, C, H, W]`` in [0, 1].
            t: Times ``[T+1]``, in frames.
            k: Which transformation acts; models that know none check and ignore it, and need none.
            samples: S, the number of importance samples.
            context: Refused: a baseline knows none.
            mask: Refused likewise.
            generator: Source of the draws.
            chunk: Samples decoded at a time, to bound memory.

        Returns:
            Bounds ``[B]``, in nats per sequence.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If ``samples`` is not positive, k is missing and the model has a transformation, or an argument
                does not fit.
        """
        check_count("samples", samples)
        refuse_beside(self, context=context, mask=mask)
        k = self._given(k)
        frames, t = self._checked(frames, t, k, generator)
        weigh = self._importance(frames, t, k, generator)
        bound = objectives.log_mean_exp([weigh((size,)) for size in objectives.chunks(samples, chunk)])
        return bound if bound.ndim == 1 else bound.sum(-1)

    def infer_factor(self, frames: Tensor) -> Categorical:
        """Baselines do not infer which transformation acts: raises ValueError."""
        raise ValueError(
            f"a {type(self).__name__} does not infer k: FlowFactorizedVAE with a factor encoder and "
            "SparseTransformationVAE do"
        )

    def _importance(self, frames: Tensor, t: Tensor, k: Control, generator: torch.Generator | None) -> Weigh:
        """What draws latents and gives their log importance weights, ``[S, B]``, or ``[S, B, T+1]`` of every frame."""
        raise NotImplementedError

    def _importance_of_paths(
        self, frames: Tensor, path: Callable[[Tensor], Tensor], generator: torch.Generator | None
    ) -> Weigh:
        """`_importance` where the first latent is all that is drawn, and ``path`` gives those of all frames."""
        q, prior = self.encode(frames[:, 0]), self.prior.at(0.0)

        def weigh(size: tuple[int]) -> Tensor:
            z0 = objectives.draw(q, size, generator)
            # Frame by frame: x_t [B, C, H, W] against every sample's z_t [S, B, D].
            log_p = torch.stack([self.decoder(z).log_prob(x) for z, x in zip(path(z0), frames.unbind(1), strict=True)])
            return log_p.sum(0) + prior.log_prob(z0) - q.log_prob(z0)

        return weigh

    def _given(self, k: Control | None) -> Control:
        """The control; any will do where k is missing and the model has no transformation."""
        if k is None and self.has_transformation:
            raise ValueError(f"a {type(self).__name__} needs k, which transformation acts in each sequence")
        return 0 if k is None else k

    def _checked(
        self, frames: Tensor, t: Any, k: Control | None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        k = self._given(k)
        frames, t = check_frames(frames, t, self._frame_shape, own_times=True)
        if t.ndim > 1:
            raise ValueError(
                f"a {type(self).__name__} takes times that all sequences share, t [T+1], got those of each, "
                f"{list(t.mT.shape)}: take a model with a latent flow for irregular films"
            )
        check_times(t)
        check_batch_control(k, len(frames))
        if not isinstance(k, Schedule):
            resolve(k, frames.shape[:1], self.num_flows, dtype=frames.dtype, device=frames.device)
        check_generator(generator, frames.device)
        return frames, t

    def _checked_transform(self, x0: Tensor, t: Any, control: Control, context: Any = None) -> Tensor:
        """Checks the arguments of `transform`; returns the times."""
        refuse_beside(self, context=context)
        event = self._frame_shape
        if not isinstance(x0, Tensor) or x0.ndim != 4 or (event is not None and tuple(x0.shape[1:]) != event):
            wanted = "C, H, W" if event is None else ", ".join(map(str, event))
            got = list(x0.shape) if isinstance(x0, Tensor) else type(x0).__name__
            raise ValueError(f"x0 must be images [B, {wanted}], got {got}")
        when = times(t, x0)
        if when.ndim > 1:
            raise ValueError(
                f"a {type(self).__name__} takes times that all images share, t [T], got shape {list(when.shape)}"
            )
        check_times(when)
        travelled(control, when, len(x0), self.num_flows)
        return when


def check_times(t: Tensor) -> None:
    """Raises ValueError unless times are a vector ``[T]``, finite and strictly monotone."""
    if t.ndim != 1 or not len(t):
        raise ValueError(f"t must hold times [T], got shape {list(t.shape)}")
    steps = t.diff()
    if not bool(torch.isfinite(t).all()) or not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise ValueError(f"t must be finite and strictly increasing or decreasing, got {t.tolist()}")
