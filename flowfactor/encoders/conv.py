"""Convolutional encoders and decoders of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from flowfactor._checks import check_count
from flowfactor.encoders._stages import (
    KERNEL,
    PAPER_WIDTH,
    PATCH,
    UPSAMPLES,
    LocalLinear,
    make_plan,
    paper_decoder,
    paper_encoder,
    patches_decoder,
    patches_encoder,
)
from flowfactor.encoders.base import Decoder, GaussianEncoder, activation_layer
from flowfactor.encoders.likelihoods import Likelihood


class ConvEncoder(GaussianEncoder):
    """Posterior q(z|x) of a frame by convolutions.

    The default architecture cuts the frame into patches (a pixel unshuffle) and convolves on the coarse grid, where a
    processor is fastest: stages of convolution and activation, then linear layers over the whole grid, then a linear
    head each for mean and standard deviation. Grids above 8 x 8 are halved by later stages.

    Args:
        latent_dim: D.
        channels: C.
        image_size: H = W, or (H, W); both divisible by 4.
        widths: Channels of each stage; 64 each where None, with as many stages as the image size asks for. The
            paper's architecture has five.
        hidden: Widths of the linear layers between the grid and the heads.
        skip: Whether the heads see the grid as well, past the hidden layers (a skip connection that joins, as in DenseNet,
            Huang et al. 2017): what a linear map of the grid can do is then learned as fast as without them.
        strides: 1 or 2 for each stage; where None, the last stages halve the grid until it is 8 x 8 or smaller.
        kernel_size: Odd size of the convolutions: 1 maps each patch by itself before the linear layers join them and
            is the fastest; 3 lets neighbours mix. Stages that halve the grid use 3 at least, so as to skip no patch.
        patch_size: 1, 2, 4 or 8: side of the patches; 1 convolves the pixels themselves.
        residual: How many residual blocks, shared by all positions, follow the stages.
        local: Whether the first stage has weights of its own for each position, instead of a convolution.
        activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"tanh"``.
        architecture: ``"patches"``, or ``"paper"`` (see `ConvEncoder.paper`).

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size does not fit or a name is unknown.

    Example:
        >>> import torch
        >>> encoder = ConvEncoder(latent_dim=16, channels=3, image_size=28)
        >>> posterior = encoder(torch.rand(2, 9, 3, 28, 28))
        >>> posterior.batch_shape, posterior.event_shape
        (torch.Size([2, 9]), torch.Size([16]))
    """

    def __init__(
        self,
        latent_dim: int,
        channels: int = 3,
        image_size: int | Sequence[int] = 28,
        widths: Sequence[int] | None = None,
        *,
        hidden: Sequence[int] = (),
        skip: bool = False,
        strides: Sequence[int] | None = None,
        kernel_size: int = KERNEL,
        patch_size: int = PATCH,
        residual: int = 0,
        local: bool = False,
        activation: str = "relu",
        architecture: str = "patches",
    ) -> None:
        shape = (kernel_size, patch_size, residual, local)
        plan = make_plan(channels, image_size, widths, strides, hidden, *shape, activation, architecture, skip)
        build = paper_encoder if architecture == "paper" else patches_encoder
        body, features = build(plan, activation_layer(activation))
        super().__init__(latent_dim, plan.event, features)
        self._fill_in(**plan.chosen)
        self.body = body

    @classmethod
    def paper(
        cls, latent_dim: int, channels: int = 3, image_size: int | Sequence[int] = 28, width: int = PAPER_WIDTH
    ) -> ConvEncoder:
        """The encoder of Song et al. (NeurIPS 2023), for d = width.

        Convolutions 4 x 4 (stride 2), 4 x 4 (stride 2), 7 x 7, 1 x 1 and 1 x 1 with d, 2d, 3d, 2d and 2d channels,
        ReLU, and two linear heads. At 28 x 28 the third layer leaves one position; larger frames leave a grid, which
        the heads span, and smaller ones shrink its kernel to their grid.

        Args:
            latent_dim: D.
            channels: C.
            image_size: H = W, or (H, W); both divisible by 4.
            width: d.

        Returns:
            The encoder.

        Raises:
            TypeError: If a size is not an integer.
            ValueError: If a size does not fit.

        Example:
            >>> ConvEncoder.paper(16, width=8).config["widths"]
            [8, 16, 24, 16, 16]
        """
        d = check_count("width", width)
        return cls(latent_dim, channels, image_size, (d, 2 * d, 3 * d, 2 * d, 2 * d), architecture="paper")

    def features(self, x: Tensor) -> Tensor:
        """Features [N, F] of frames [N, C, H, W]."""
        return self.body(x)


class ConvDecoder(Decoder):
    """Likelihood p(x|z) of a frame by convolutions: the mirror of `ConvEncoder`, with the same arguments.

    The default architecture maps the latent linearly to a coarse grid, then each position to a patch of pixels. Every
    position has weights of its own, so patches join without seams, and on a processor a step takes about a fifth
    of the time that transposed convolutions with as many parameters take. Larger kernels and more stages cost more.

    Args:
        latent_dim: D.
        channels: C.
        image_size: H = W, or (H, W); both divisible by 4.
        widths: Channels of each stage in the encoder's order (the decoder runs them backwards).
        hidden: Widths of the linear layers in the encoder's order, the last one next to the latent.
        skip: Whether the grid is made of the latent as well as of the hidden layers.
        strides: 1 or 2 for each stage, in the encoder's order; a 2 doubles the grid here.
        kernel_size: Odd size of the convolutions; 1 maps each position by itself and is the fastest, 3 lets neighbours
            mix.
        patch_size: 1, 2, 4 or 8: factor of the last pixel shuffle.
        residual: How many residual blocks, shared by all positions, precede the stages.
        local: Whether the map to pixels has weights of its own for each position, instead of a convolution.
        activation: ``"relu"``, ``"silu"``, ``"gelu"`` or ``"tanh"``.
        upsample: How a grid is doubled: ``"shuffle"`` (a convolution and a pixel shuffle) or ``"transpose"`` (a 4 x 4
            transposed convolution). The paper's architecture always transposes.
        architecture: ``"patches"``, or ``"paper"`` (see `ConvDecoder.paper`).
        likelihood: `Bernoulli` (default) or `Gaussian`, its name or its config.
        initial_mean: Mean of the untrained decoder, such as the data's average pixel: sets the last bias,
            which saves the first few hundred steps where most pixels are black.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size does not fit or a name is unknown.

    Example:
        >>> import torch
        >>> decoder = ConvDecoder(latent_dim=16, channels=3, image_size=28)
        >>> z = torch.randn(2, 9, 16)
        >>> decoder.mean(z).shape
        torch.Size([2, 9, 3, 28, 28])
        >>> decoder(z).log_prob(torch.rand(2, 9, 3, 28, 28)).shape
        torch.Size([2, 9])
    """

    def __init__(
        self,
        latent_dim: int,
        channels: int = 3,
        image_size: int | Sequence[int] = 28,
        widths: Sequence[int] | None = None,
        *,
        hidden: Sequence[int] = (),
        skip: bool = False,
        strides: Sequence[int] | None = None,
        kernel_size: int = KERNEL,
        patch_size: int = PATCH,
        residual: int = 0,
        local: bool = False,
        activation: str = "relu",
        upsample: str = "shuffle",
        architecture: str = "patches",
        likelihood: Likelihood | str | Mapping[str, Any] | None = None,
        initial_mean: float | None = None,
    ) -> None:
        shape = (kernel_size, patch_size, residual, local)
        plan = make_plan(channels, image_size, widths, strides, hidden, *shape, activation, architecture, skip)
        if upsample not in UPSAMPLES:
            raise ValueError(f"unknown upsample {upsample!r}: choose one of {', '.join(map(repr, UPSAMPLES))}")
        super().__init__(latent_dim, plan.event, likelihood)
        self._fill_in(**plan.chosen)
        layer = activation_layer(activation)
        if architecture == "paper":
            self.body = paper_decoder(plan, latent_dim, layer)
        else:
            self.body = patches_decoder(plan, latent_dim, layer, upsample)
        kinds = (nn.Conv2d, nn.ConvTranspose2d, LocalLinear)
        last = [module for module in self.body.modules() if isinstance(module, kinds)][-1]
        self._start_at(last.bias, initial_mean)

    @classmethod
    def paper(
        cls,
        latent_dim: int,
        channels: int = 3,
        image_size: int | Sequence[int] = 28,
        width: int = PAPER_WIDTH,
        likelihood: Likelihood | str | Mapping[str, Any] | None = None,
    ) -> ConvDecoder:
        """The decoder of Song et al. (NeurIPS 2023): transposed convolutions that mirror `ConvEncoder.paper`.

        Args:
            latent_dim: D.
            channels: C.
            image_size: H = W, or (H, W); both divisible by 4.
            width: d.
            likelihood: `Bernoulli` (default, the paper's) or `Gaussian`, its name or its config.

        Returns:
            The decoder.

        Raises:
            TypeError: If a size is not an integer.
            ValueError: If a size does not fit.

        Example:
            >>> import torch
            >>> ConvDecoder.paper(16, width=8).mean(torch.randn(16)).shape
            torch.Size([3, 28, 28])
        """
        d = check_count("width", width)
        widths = (d, 2 * d, 3 * d, 2 * d, 2 * d)
        return cls(latent_dim, channels, image_size, widths, architecture="paper", likelihood=likelihood)

    def outputs(self, z: Tensor) -> Tensor:
        """Raw outputs [N, C, H, W] of latents [N, D]."""
        return self.body(z)
