"""Likelihoods p(x|z): how a decoder's raw outputs become a distribution over frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn import functional as F

from flowfactor._config import Named, named
from flowfactor.registry import declare

# A learned scale on noiseless pixels (a black background) is driven to 0, where the density is unbounded and the
# gradient 1/scale explodes. A quarter of an 8-bit grey level is finer than any pixel can tell.
MIN_SCALE = 1e-3


def _logit(mean: float) -> float:
    if not 0 < mean < 1:
        raise ValueError(f"the mean of frames in [0, 1] must lie strictly inside, got {mean}")
    return math.log(mean / (1 - mean))


class Event(Independent):
    """torch's Independent, whose log_prob also takes an empty batch and refuses an event of another shape.

    Example:
        >>> import torch
        >>> Event(Normal(torch.zeros(0, 3), torch.ones(0, 3)), 1).log_prob(torch.zeros(0, 3)).shape
        torch.Size([0])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the whole event, in nats.

        Args:
            value: [*sample, *batch, *event].

        Returns:
            The sum over the event, [*sample, *batch].

        Raises:
            ValueError: If the trailing dimensions are not the event shape; torch would broadcast a single channel.
        """
        self._check_event(value)
        return self.base_dist.log_prob(value).sum(tuple(range(-len(self.event_shape), 0)))

    def _check_event(self, value: Tensor) -> None:
        event = self.event_shape
        if value.shape[value.ndim - len(event) :] != event:
            raise ValueError(f"values must have the event shape {list(event)}, got {list(value.shape)}")


class _UnitBernoulli(torch.distributions.Bernoulli):
    """A Bernoulli whose log_prob takes any value in [0, 1], as a cross-entropy; it still samples 0 and 1.

    torch's own validation makes several passes over every pixel: it is off, and one pass over the values stands in for it.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        _check_unit(value)
        return value * self.logits - _softplus(self.logits)


class _BernoulliEvent(Event):
    """Bernoulli pixels whose two terms are summed apart, a third of the passes forward and backward: x l - ln(1 + e^l)."""

    def log_prob(self, value: Tensor) -> Tensor:
        self._check_event(value)
        _check_unit(value)
        logits = self.base_dist.logits
        dims = tuple(range(-len(self.event_shape), 0))
        return (value * logits).sum(dims) - _softplus(logits).sum(dims)


def _softplus(logits: Tensor) -> Tensor:
    """Ln(1 + e^l), to the precision of a double (torch's threshold of 20 is that of a float)."""
    return F.softplus(logits, threshold=40.0)


def _check_unit(value: Tensor) -> None:
    if value.numel():
        low, high = (bound.item() for bound in value.detach().aminmax())
        if not (low >= 0 and high <= 1):  # written so that NaN fails
            raise ValueError(
                f"frames must lie in [0, 1] for a Bernoulli likelihood, got values from {low:g} to {high:g}; "
                "divide bytes by 255, or use Gaussian(bounded=False)"
            )


class Likelihood(Named, nn.Module):
    """Base of the likelihoods: turns a decoder's raw outputs into a distribution over frames.

    A subclass sets `name` and implements `mean` and `forward`.

    Attributes:
        name: Short name for metrics and files, for example ``"bernoulli"``.

    Example:
        >>> Likelihood.build("gaussian").name
        'gaussian'
    """

    kind_of_part = "likelihood"
    name: ClassVar[str]

    def mean(self, raw: Tensor) -> Tensor:
        """Mean frame.

        Args:
            raw: Decoder outputs, any shape.

        Returns:
            The mean, of raw's shape.
        """
        raise NotImplementedError

    def inverse_mean(self, mean: float) -> float:
        """The raw output that has a given mean.

        Args:
            mean: The mean of a pixel.

        Returns:
            The raw output.

        Raises:
            ValueError: If no raw output has this mean.
        """
        raise NotImplementedError

    def forward(self, raw: Tensor, event_dims: int = 3) -> Distribution:
        """Distribution over frames.

        Args:
            raw: Decoder outputs [*batch, *event].
            event_dims: How many trailing dimensions form one event: 3 for frames [C, H, W].

        Returns:
            A Distribution with batch shape [*batch], whose log_prob sums over the event, in nats.
        """
        raise NotImplementedError

    @staticmethod
    def build(likelihood: Likelihood | str | Mapping[str, Any] | None) -> Likelihood:
        """Gives a likelihood from what a user or a config file names.

        Args:
            likelihood: A `Likelihood` (returned as it is), a name, a `config` mapping, or None for `Bernoulli`.

        Returns:
            The likelihood.

        Raises:
            ValueError: If the name is unknown.
            TypeError: If it is none of these.

        Example:
            >>> Likelihood.build({"name": "gaussian", "scale": 0.1}).scale.item()
            0.1...
        """
        return named(Likelihood, "bernoulli" if likelihood is None else likelihood)


class Bernoulli(Likelihood):
    r"""Bernoulli pixels, from logits: \(\ln p(x|z) = \sum_i x_i \ln \mu_i + (1 - x_i) \ln(1 - \mu_i)\).

    Computed from the logits without ever forming \(\ln\mu\), so it stays finite for saturated pixels. For binary pixels
    this is a probability. Grey values in [0, 1] are accepted, as is common for image models, and give minus the
    cross-entropy, which is *not* a normalised density over [0, 1]: compare such values only with each other, and use
    `Gaussian` where a density in nats is to be reported. Values outside [0, 1] raise ValueError.

    Example:
        >>> import torch
        >>> likelihood = Bernoulli()
        >>> likelihood(torch.zeros(2, 1, 4, 4)).log_prob(torch.ones(2, 1, 4, 4))  # 16 ln(1/2)
        tensor([-11.0904, -11.0904])
    """

    name: ClassVar[str] = "bernoulli"

    def mean(self, raw: Tensor) -> Tensor:
        """Probability of one, sigmoid(raw), in [0, 1] and of raw's shape."""
        return torch.sigmoid(raw)

    def inverse_mean(self, mean: float) -> float:
        """The logit of a mean inside (0, 1)."""
        return _logit(mean)

    def forward(self, raw: Tensor, event_dims: int = 3) -> Distribution:
        """Distribution over frames [*event] from logits [*batch, *event]; log_prob takes values in [0, 1]."""
        return _BernoulliEvent(_UnitBernoulli(logits=raw, validate_args=False), event_dims, validate_args=False)


class Gaussian(Likelihood):
    r"""Gaussian pixels with one scale: \(\ln p(x|z) = -|x - \mu|^2 / 2\sigma^2 - \frac{D}{2} \ln 2\pi\sigma^2\).

    D counts pixels times channels. With the scale 1 no decoder can exceed \(-\frac{D}{2} \ln 2\pi\), which is -2161.34
    nats for 28 x 28 x 3 frames.

    A learned scale is softplus(parameter) + 0.001. Softplus grows linearly where exp would let one optimiser step
    multiply the scale; the floor keeps the density bounded on pixels without noise, such as a black background, which
    would otherwise drive the scale to 0 and the gradient to infinity.

    Args:
        scale: Standard deviation \(\sigma\) of a pixel, where it starts if it is learned.
        learned: Whether the scale is a parameter.
        bounded: Whether the mean passes through a sigmoid, as suits frames in [0, 1]. Turn it off for unbounded data.

    Raises:
        ValueError: If scale is not positive and finite, or is learned and not above 0.001.

    Example:
        >>> import torch
        >>> likelihood = Gaussian(scale=1.0)
        >>> likelihood(torch.zeros(3, 28, 28)).log_prob(torch.full((3, 28, 28), 0.5))
        tensor(-2161.3...)
    """

    name: ClassVar[str] = "gaussian"

    def __init__(self, scale: float = 1.0, learned: bool = False, bounded: bool = True) -> None:
        super().__init__()
        floor = MIN_SCALE if learned else 0.0
        if not floor < scale < math.inf:
            raise ValueError(f"scale must be above {floor} and finite{' when learned' if learned else ''}, got {scale}")
        self._scale = float(scale)
        self.learned = bool(learned)
        self.bounded = bool(bounded)
        if learned:
            excess = self._scale - MIN_SCALE
            self.raw_scale = nn.Parameter(torch.tensor(excess + math.log(-math.expm1(-excess))))  # inverse softplus

    @property
    def scale(self) -> Tensor:
        """The standard deviation, a scalar tensor."""
        if self.learned:
            return F.softplus(self.raw_scale) + MIN_SCALE
        return torch.tensor(self._scale)

    def mean(self, raw: Tensor) -> Tensor:
        """Mean frame, sigmoid(raw) or raw where unbounded, of raw's shape."""
        return torch.sigmoid(raw) if self.bounded else raw

    def inverse_mean(self, mean: float) -> float:
        """The logit of a mean inside (0, 1), or the mean itself where unbounded."""
        return _logit(mean) if self.bounded else float(mean)

    def forward(self, raw: Tensor, event_dims: int = 3) -> Distribution:
        """Distribution over frames [*event] from raw outputs [*batch, *event]; log_prob is a density in nats."""
        mean = self.mean(raw)
        scale = self.scale.to(mean.dtype) if self.learned else mean.new_full((), self._scale)
        return Event(Normal(mean, scale.expand_as(mean), validate_args=False), event_dims, validate_args=False)


declare("likelihood", bernoulli=Bernoulli, gaussian=Gaussian)
