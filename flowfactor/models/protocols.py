"""What is asked of a sequence model: a model of one's own needs what the functions that it is handed to say, and no base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from flowfactor.control import Control
from flowfactor.encoders import SparseWeights


class HasFlows(Protocol):
    """A model of K transformations."""

    @property
    def num_flows(self) -> int:
        """K."""
        ...


class Transforms(HasFlows, Protocol):
    """A model that transforms images."""

    def transform(self, x0: Tensor, t: Tensor | Sequence[float], control: Control, /) -> Tensor:
        """Frames ``[B, T, C, H, W]`` of images ``x0 [B, C, H, W]`` at times ``t [T]``.

        For data with a context it takes that as ``context=``; for such of irregular times, ``t [B, T]``.
        """
        ...


class Encodes(Protocol):
    """A model with codes of frames."""

    def encode(self, x: Tensor, /) -> Distribution:
        """The posterior of frames ``[*batch, C, H, W]``, event ``[D]``.

        A model whose latents have more dimensions than the encoder writes has ``code_dim``: the first so many are the code.
        """
        ...


class Autoencodes(Encodes, Protocol):
    """A model with codes of frames and frames of codes."""

    def decode(self, z: Tensor, /) -> Tensor:
        """The mean frames ``[*batch, C, H, W]`` of latents ``[*batch, D]``."""
        ...


class MovesCodes(HasFlows, Encodes, Protocol):
    """A model that moves codes by its transformations: it has ``path(z0, t, control)``, or a `LatentFlow` ``flow``."""


class MovesImages(MovesCodes, Autoencodes, Protocol):
    """A model that moves codes and makes frames of them."""


class InfersFactor(HasFlows, Protocol):
    """A model that infers which transformation acts in a sequence."""

    def infer_factor(self, frames: Tensor, /) -> Categorical:
        """q(k|x) of sequences ``[B, T+1, C, H, W]``, batch ``[B]``."""
        ...


@runtime_checkable
class InfersWeights(HasFlows, Protocol):
    """A model that infers which transformations act between frames."""

    def infer_weights(self, frames: Tensor, /) -> SparseWeights:
        """q(g|x) of sequences ``[B, T+1, C, H, W]``."""
        ...


class BoundsLikelihood(HasFlows, Protocol):
    """A model with importance-weighted bounds."""

    @property
    def objective(self) -> object:
        """The bound: an `flowfactor.objectives.Objective`, or a name."""
        ...

    @property
    def decoder(self) -> nn.Module:
        """What decodes; its ``likelihood.name``, where it has one, says of what kind the bound is."""
        ...

    def log_likelihood(
        self, frames: Tensor, t: Tensor, k: Control | None, samples: int, /, *, generator: torch.Generator | None
    ) -> Tensor:
        """Bounds ``[B]`` of sequences ``[B, T+1, C, H, W]``, in nats.

        For data with a context or missing frames it takes ``context=`` and ``mask=``.
        """
        ...


class SequenceModel(Transforms, Autoencodes, InfersFactor, BoundsLikelihood, Protocol):
    """A sequence model with all that training, evaluation and plots ask for; those of `flowfactor.models` are such.

    Example:
        >>> import flowfactor as ff
        >>> model: SequenceModel = ff.models.build_vae((1, 8, 8), num_flows=2, latent_dim=4, hidden=(8, 8))
        >>> model.num_flows, model.supervision, model.has_transformation
        (2, 'full', True)
    """

    @property
    def supervision(self) -> str:
        """``"full"`` where k has to be given, ``"weak"`` or ``"none"`` where it is inferred; ``"full"`` where missing."""
        ...

    @property
    def has_transformation(self) -> bool:
        """Whether the model itself says how a transformation moves a latent; so it does where this is missing."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, as those of any module."""
        ...

    def eval(self) -> Any:
        """Puts the model into evaluation mode, and gives it, as any module does."""
        ...


def code_of(model: object, z: Tensor) -> Tensor:
    """The code ``[*batch, D]`` in latents ``[*batch, D + A]`` of a model: without dimensions at rest, where it has some."""
    return z[..., : getattr(model, "code_dim", None)]


def infers_k(model: object) -> bool:
    """Whether a model infers which transformation acts, so that its flows have to be matched to the true ones."""
    return getattr(model, "supervision", "full") != "full"


def knows_transformations(model: object) -> bool:
    """Whether a model says by itself how a transformation moves a latent."""
    return getattr(model, "has_transformation", True)
