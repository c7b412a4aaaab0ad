"""What every encoder and decoder shares: checks, leading dimensions, the Gaussian heads and the likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn import functional as F

from flowfactor._checks import check_count
from flowfactor._config import Configured
from flowfactor.encoders.likelihoods import Event, Likelihood

# The KL of a posterior holds -ln std, so its gradient is 1/std: the floor bounds both.
MIN_STD = 1e-4
# softplus(0 + shift) = 1: an untrained encoder starts near the standard normal prior instead of far from it.
_UNIT_SHIFT = math.log(math.expm1(1.0))

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


def activation_layer(name: str) -> Callable[[], nn.Module]:
    """Gives the constructor of an activation.

    Args:
        name: One of ``"relu"``, ``"silu"``, ``"gelu"``, ``"tanh"``.

    Returns:
        A callable that makes the module.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> activation_layer("relu")()
        ReLU()
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: choose one of {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[name]


def sizes(name: str, values: Sequence[int], *, least: int = 0) -> tuple[int, ...]:
    """Checks a sequence of sizes, such as layer widths.

    Args:
        name: What it is called, for the message.
        values: The sizes.
        least: How many there must be at least.

    Returns:
        The sizes, as a tuple.

    Raises:
        TypeError: If it is no sequence of integers.
        ValueError: If one is below 1 or there are too few.

    Example:
        >>> sizes("widths", [32, 64])
        (32, 64)
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of integers such as (32, 64), got {values!r}")
    checked = tuple(check_count(f"{name}[{i}]", value) for i, value in enumerate(values))
    if len(checked) < least:
        raise ValueError(f"{name} must hold at least {least} value(s), got {values!r}")
    return checked


def dense(widths: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Stacks linear layers, each followed by the activation.

    Args:
        widths: The input width and each layer's width.
        activation: Makes the activation module.

    Returns:
        The layers; empty where widths holds one number only.

    Example:
        >>> dense((4, 8), nn.ReLU)
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
        )
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers)


def check_input(x: Tensor, event: tuple[int, ...], what: str, module: nn.Module) -> None:
    """Checks an input ``[*batch, *event]``; takes what `flatten_batch` takes and raises what it raises."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(x).__name__}")
    if tuple(x.shape[-len(event) :]) != event:
        names = ", ".join(str(size) for size in event)
        raise ValueError(f"{what} must have the shape [*batch, {names}], got {list(x.shape)}")
    if not x.is_floating_point():
        hint = "; bytes 0..255 become frames with frames.float() / 255" if x.dtype == torch.uint8 else ""
        raise TypeError(f"{what} must be floating point, got {x.dtype}{hint}")
    dtype = next(module.parameters()).dtype
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{what} are {x.dtype} but the module's parameters are {dtype}: convert one with .to(dtype)")


def flatten_batch(x: Tensor, event: tuple[int, ...], what: str, module: nn.Module) -> Tensor:
    """Checks an input and folds its leading dimensions into one.

    Args:
        x: Input [*batch, *event].
        event: The shape that the trailing dimensions must have.
        what: What the input is called, for messages.
        module: The module that is about to take it, for its dtype.

    Returns:
        x as [N, *event], N the product of the batch sizes (1 where there are none).

    Raises:
        TypeError: If x is not floating point, or of another dtype than the module's parameters.
        ValueError: If the trailing dimensions differ.

    Example:
        >>> import torch
        >>> flatten_batch(torch.rand(2, 3, 5), (5,), "z", nn.Linear(5, 1)).shape
        torch.Size([6, 5])
    """
    check_input(x, event, what, module)
    # The explicit size, not -1: with an empty batch -1 would be ambiguous.
    return x.reshape(math.prod(x.shape[: x.dim() - len(event)]), *event)


class GaussianEncoder(Configured, nn.Module):
    r"""Base of the encoders: q(z|x) = N(mean(x), diag(std(x)^2)) from features that a subclass computes.

    The standard deviation is softplus(head) + 0.0001, about 1 for an untrained encoder. Softplus grows linearly, where
    exp(log-variance / 2) lets one unlucky frame overflow; the floor bounds the KL's -ln std and its gradient 1/std.

    Args:
        latent_dim: D.
        event: Shape of one input, for example (C, H, W).
        features: Width of what `features` returns.
        config: Has no effect any more: arguments of constructors are remembered by themselves.

    Example:
        >>> from flowfactor.encoders import MLPEncoder
        >>> encoder = MLPEncoder((1, 8, 8), latent_dim=4)
        >>> isinstance(encoder, GaussianEncoder), encoder.latent_dim
        (True, 4)
    """

    kind_of_part = "encoder"

    def __init__(
        self, latent_dim: int, event: tuple[int, ...], features: int, config: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.event_shape = event
        self.mean_head = nn.Linear(features, latent_dim)
        self.std_head = nn.Linear(features, latent_dim)

    def features(self, x: Tensor) -> Tensor:
        """Features of a flat batch.

        Args:
            x: Inputs [N, *event].

        Returns:
            Features [N, F], F the width given to the constructor.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Independent:
        """Posterior q(z|x).

        Args:
            x: Inputs [*batch, *event], floating point; frames are [*batch, C, H, W] in [0, 1].

        Returns:
            Independent(Normal(mean, std), 1) with batch shape [*batch] and event shape [D].

        Raises:
            TypeError: If x is not floating point or differs from the parameters' dtype.
            ValueError: If the trailing dimensions are not the event shape.
        """
        features = self.features(flatten_batch(x, self.event_shape, "frames", self))
        shape = (*x.shape[: x.dim() - len(self.event_shape)], self.latent_dim)
        mean = self.mean_head(features).reshape(shape)
        std = F.softplus(self.std_head(features) + _UNIT_SHIFT).reshape(shape) + MIN_STD
        return Event(Normal(mean, std), 1)


class Decoder(Configured, nn.Module):
    """Base of the decoders: p(x|z), a likelihood over raw outputs that a subclass computes.

    Args:
        latent_dim: D.
        event: Shape of one output, for example (C, H, W).
        likelihood: A likelihood, its name or its config; `Bernoulli` where None.
        config: Has no effect any more, as in `GaussianEncoder`.

    Raises:
        TypeError: If latent_dim is not an integer or likelihood is none of these.
        ValueError: If latent_dim is below 1 or the likelihood's name is unknown.

    Example:
        >>> from flowfactor.encoders import MLPDecoder
        >>> decoder = MLPDecoder(4, (1, 8, 8), likelihood="gaussian")
        >>> isinstance(decoder, Decoder), decoder.likelihood.name
        (True, 'gaussian')
    """

    kind_of_part = "encoder"

    def __init__(
        self,
        latent_dim: int,
        event: tuple[int, ...],
        likelihood: Likelihood | str | Mapping[str, Any] | None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.latent_dim = check_count("latent_dim", latent_dim)
        self.event_shape = event
        self.likelihood = Likelihood.build(likelihood)
        self._fill_in(likelihood=self.likelihood)

    def outputs(self, z: Tensor) -> Tensor:
        """Raw outputs of a flat batch, before the likelihood.

        Args:
            z: Latents [N, D].

        Returns:
            Raw outputs [N, *event].
        """
        raise NotImplementedError

    def _start_at(self, bias: Tensor | None, initial_mean: float | None) -> None:
        """Sets the last layer's bias so that the untrained decoder gives about this mean; None leaves it alone."""
        if bias is not None and initial_mean is not None:
            nn.init.constant_(bias, self.likelihood.inverse_mean(initial_mean))

    def _raw(self, z: Tensor) -> Tensor:
        raw = self.outputs(flatten_batch(z, (self.latent_dim,), "latents", self))
        return raw.reshape(*z.shape[:-1], *self.event_shape)

    def mean(self, z: Tensor) -> Tensor:
        """Mean frames, in [0, 1] for `Bernoulli` and bounded `Gaussian` likelihoods.

        Args:
            z: Latents [*batch, D].

        Returns:
            Frames [*batch, *event].

        Raises:
            TypeError: If z is not floating point or differs from the parameters' dtype.
            ValueError: If the last dimension is not D.
        """
        return self.likelihood.mean(self._raw(z))

    def forward(self, z: Tensor) -> Distribution:
        """Likelihood p(x|z).

        Args:
            z: Latents [*batch, D].

        Returns:
            A Distribution with batch shape [*batch] and event shape [*event]; log_prob sums over the event, in nats.

        Raises:
            TypeError: If z is not floating point or differs from the parameters' dtype.
            ValueError: If the last dimension is not D.
        """
        return self.likelihood(self._raw(z), len(self.event_shape))
