from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from flowfactor.encoders import Bernoulli, ConvDecoder, ConvEncoder, Gaussian, MLPDecoder, MLPEncoder

SIZES = [4, 8, 12, 28, 32, 36, 64, (28, 44), (64, 4)]
OPTIONS = [
    {},
    {"widths": (8,)},
    {"widths": (8, 8), "kernel_size": 3},
    {"widths": (8, 8), "strides": (1, 2), "kernel_size": 3},
    {"widths": (8, 16, 8), "strides": (1, 1, 2), "patch_size": 2},
    {"widths": (8, 16), "strides": (2, 2), "patch_size": 1},
    {"widths": (8, 8), "strides": (2, 2), "hidden": (12, 20), "activation": "silu"},
    {"widths": (8, 8), "kernel_size": 5, "activation": "gelu"},
    {"widths": (8,), "hidden": (16,), "residual": 2, "local": True, "activation": "silu"},
    {"widths": (8, 12), "strides": (1, 2), "residual": 1, "local": True},
    {"widths": (8,), "hidden": (16, 12), "skip": True, "local": True},
    {"widths": (4, 8, 12, 8, 8), "architecture": "paper"},
]
ENCODERS = {
    "conv": lambda: ConvEncoder(5, 2, (12, 16), (8, 8)),
    "paper": lambda: ConvEncoder.paper(5, 2, (28, 32), width=4),
    "mlp": lambda: MLPEncoder((2, 3, 4), 5, (8,)),
    "local": lambda: ConvEncoder(5, 2, (12, 16), (8, 8), residual=1, local=True),
    "vector": lambda: MLPEncoder(7, 5, (), activation="tanh"),
}
DECODERS = {
    "conv": lambda likelihood=None: ConvDecoder(5, 2, (12, 16), (8, 8), likelihood=likelihood),
    "paper": lambda likelihood=None: ConvDecoder.paper(5, 2, (28, 32), width=4, likelihood=likelihood),
    "mlp": lambda likelihood=None: MLPDecoder(5, (2, 3, 4), (8,), likelihood=likelihood),
    "local": lambda likelihood=None: ConvDecoder(5, 2, (12, 16), (8, 8), residual=1, local=True, likelihood=likelihood),
    "vector": lambda likelihood=None: MLPDecoder(5, 7, (), activation="tanh", likelihood=likelihood),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("architecture", ["patches", "paper"])
def test_every_image_size_goes_both_ways(size: int | tuple[int, int], architecture: str) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    encoder = ConvEncoder(6, 3, size, architecture=architecture)
    decoder = ConvDecoder(6, 3, size, architecture=architecture)
    posterior = encoder(torch.rand(2, 3, height, width))
    assert posterior.mean.shape == (2, 6)
    assert decoder.mean(posterior.rsample()).shape == (2, 3, height, width)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_go_both_ways(options: dict) -> None:
    encoder, decoder = ConvEncoder(6, 1, 28, **options), ConvDecoder(6, 1, 28, **options)
    assert encoder(torch.rand(3, 1, 28, 28)).mean.shape == (3, 6)
    assert decoder.mean(torch.randn(3, 6)).shape == (3, 1, 28, 28)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_patches_are_torchs_pixel_shuffle(patch: int, kind: torch.dtype) -> None:
    x = torch.rand(2, 3, 8, 24, dtype=kind)
    cut = ConvEncoder(4, 3, (8, 24), patch_size=patch).body[0](x)
    torch.testing.assert_close(cut, nn.functional.pixel_unshuffle(x, patch), rtol=0, atol=0)
    torch.testing.assert_close(ConvDecoder(4, 3, (8, 24), patch_size=patch).body[-1](cut), x, rtol=0, atol=0)


def test_transposed_convolutions_double_the_grid_too() -> None:
    decoder = ConvDecoder(6, 1, 28, (8, 8, 8), strides=(2, 2, 2), patch_size=1, upsample="transpose")
    assert sum(isinstance(module, nn.ConvTranspose2d) for module in decoder.modules()) == 3
    assert decoder.mean(torch.randn(2, 6)).shape == (2, 1, 28, 28)  # 4 -> 8, cropped to 7 -> 14 -> 28
    assert ConvDecoder(**decoder.config).config == decoder.config


@pytest.mark.parametrize(
    "decoder",
    [
        ConvDecoder(5, 3, 28, initial_mean=0.1),
        ConvDecoder(5, 3, 64, initial_mean=0.1),
        ConvDecoder(5, 3, 28, local=True, initial_mean=0.1),
        ConvDecoder(5, 3, 28, (8,), strides=(2,), initial_mean=0.1),
        ConvDecoder(5, 3, 28, architecture="paper", initial_mean=0.1),
        MLPDecoder(5, (3, 28, 28), initial_mean=0.1, likelihood="gaussian"),
        MLPDecoder(5, 20, initial_mean=0.1, likelihood=Gaussian(bounded=False)),
    ],
    ids=["patches", "halved", "local", "doubled-last", "paper", "mlp", "unbounded"],
)
def test_the_untrained_mean_can_be_set(decoder: nn.Module) -> None:
    mean = decoder.mean(1e-3 * torch.randn(8, 5)).mean().item()
    assert mean == pytest.approx(0.1, abs=0.05)
    assert type(decoder)(**decoder.config).config["initial_mean"] == 0.1


def test_local_weights_belong_to_one_position() -> None:
    decoder = ConvDecoder(6, 1, 12, (8,), local=True)
    z = torch.randn(2, 6)
    before = decoder.mean(z)
    with torch.no_grad():
        decoder.body[-2].weight[4].add_(1.0)  # position (1, 1) of the 3 x 3 grid
    changed = (decoder.mean(z) != before).all(0).squeeze(0)
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[4:8, 4:8] = True
    assert torch.equal(changed, expected)


def test_a_skip_goes_past_the_hidden_layers() -> None:
    options = {"widths": (8,), "hidden": (16, 12), "skip": True}
    encoder, decoder = ConvEncoder(6, 1, 12, **options), ConvDecoder(6, 1, 12, **options)
    frames, z = torch.rand(2, 1, 12, 12), torch.randn(2, 6)
    for part, layers in ((encoder, encoder.body[-1].body), (decoder, decoder.body[0].body)):
        for layer in layers:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        assert any(isinstance(layer, nn.Linear) for layer in layers), part
    mean, picture = encoder(frames).mean, decoder.mean(z)
    assert not torch.allclose(mean[0], mean[1]) and not torch.allclose(picture[0], picture[1])
    assert (encoder.mean_head.in_features, decoder.body[1].in_features) == (8 * 9 + 12, 6 + 16)  # beside what is hidden
    for part in (encoder, decoder):
        assert type(part)(**part.config).config["skip"] is True


def test_halving_never_skips_pixels() -> None:
    encoder = ConvEncoder(6, 1, 32, (8, 8), strides=(1, 2), kernel_size=1)
    frames = torch.rand(1, 1, 32, 32, requires_grad=True)
    encoder(frames).mean.sum().backward()
    assert (frames.grad != 0).float().mean() > 0.9


def test_large_images_are_halved_to_a_coarse_grid() -> None:
    grids = {size: ConvEncoder(4, 1, size).mean_head.in_features for size in (28, 32, 64, 128)}
    assert grids == {28: 64 * 49, 32: 64 * 64, 64: 64 * 64, 128: 64 * 64}


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (2, 0), (0,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("kind", ENCODERS)
def test_leading_dimensions(kind: str, batch: tuple[int, ...]) -> None:
    encoder, decoder = ENCODERS[kind](), DECODERS[kind]()
    x = torch.rand(*batch, *encoder.event_shape)
    posterior = encoder(x)
    assert isinstance(posterior, Independent) and isinstance(posterior.base_dist, Normal)
    assert posterior.batch_shape == batch and posterior.event_shape == (5,)
    likelihood = decoder(posterior.rsample())
    assert likelihood.batch_shape == batch and likelihood.event_shape == decoder.event_shape
    assert likelihood.log_prob(x).shape == batch
    assert decoder.mean(posterior.mean).shape == x.shape


@pytest.mark.parametrize("kind", ENCODERS)
def test_folding_the_batch_changes_no_number(kind: str) -> None:
    encoder, decoder = ENCODERS[kind](), DECODERS[kind]()
    x = torch.rand(2, 3, *encoder.event_shape)
    one_by_one = torch.stack([torch.stack([encoder(frame).mean for frame in row]) for row in x])
    torch.testing.assert_close(encoder(x).mean, one_by_one)
    z = torch.randn(2, 3, 5)
    one_by_one = torch.stack([torch.stack([decoder.mean(latent) for latent in row]) for row in z])
    torch.testing.assert_close(decoder.mean(z), one_by_one)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_empty_batch_backpropagates(kind: str) -> None:
    encoder, decoder = ENCODERS[kind](), DECODERS[kind]()
    x = torch.rand(0, *encoder.event_shape)
    decoder(encoder(x).rsample()).log_prob(x).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in decoder.parameters())


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(0.5, learned=True)], ids=lambda item: item.name)
@pytest.mark.parametrize("kind", ENCODERS)
def test_gradients_reach_every_parameter(kind: str, likelihood: nn.Module) -> None:
    encoder, decoder = ENCODERS[kind](), DECODERS[kind](likelihood)
    x = torch.rand(64, *encoder.event_shape)
    decoder(encoder(x).rsample()).log_prob(x).sum().backward()
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ENCODERS)
def test_double_precision_agrees_with_single(kind: str) -> None:
    encoder, decoder = ENCODERS[kind](), DECODERS[kind](Gaussian(0.3, learned=True))
    x, z = torch.rand(2, *encoder.event_shape), torch.randn(2, 5)
    single = encoder(x).stddev, decoder(z).log_prob(x)
    encoder, decoder = encoder.double(), decoder.double()
    double = encoder(x.double()).stddev, decoder(z.double()).log_prob(x.double())
    for low, high in zip(single, double, strict=True):
        assert high.dtype == torch.float64
        torch.testing.assert_close(low.double(), high, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_channels_last_changes_no_number(options: dict) -> None:
    encoder, decoder = ConvEncoder(6, 3, 28, **options).double(), ConvDecoder(6, 3, 28, **options).double()
    x, z = torch.rand(2, 4, 3, 28, 28).double(), torch.randn(2, 4, 6).double()
    mean, frames = encoder(x).mean, decoder.mean(z)
    encoder.to(memory_format=torch.channels_last)
    decoder.to(memory_format=torch.channels_last)
    flat = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(encoder(flat).mean, mean.flatten(0, 1))
    torch.testing.assert_close(encoder(x).mean, mean)
    torch.testing.assert_close(decoder.mean(z), frames)


def test_the_papers_encoder_has_the_papers_layers() -> None:
    shapes = []
    encoder = ConvEncoder.paper(324, 3, 28, width=16)
    layers = [layer for layer in encoder.body if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    encoder(torch.rand(1, 3, 28, 28))
    assert shapes == [(16, 14, 14), (32, 7, 7), (48, 1, 1), (32, 1, 1), (32, 1, 1)]
    assert [(layer.kernel_size, layer.stride) for layer in layers] == [
        ((4, 4), (2, 2)),
        ((4, 4), (2, 2)),
        ((7, 7), (1, 1)),
        ((1, 1), (1, 1)),
        ((1, 1), (1, 1)),
    ]
    assert (encoder.mean_head.in_features, encoder.mean_head.out_features) == (32, 324)
    assert sum(isinstance(layer, nn.ReLU) for layer in encoder.body) == 5


def test_the_papers_decoder_mirrors_its_encoder() -> None:
    shapes = []
    decoder = ConvDecoder.paper(324, 3, 28, width=16)
    for layer in decoder.body:
        if isinstance(layer, nn.ConvTranspose2d):
            layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    decoder.mean(torch.randn(1, 324))
    assert shapes == [(32, 1, 1), (48, 1, 1), (32, 7, 7), (16, 14, 14), (3, 28, 28)]


@pytest.mark.parametrize("kind", ENCODERS)
def test_config_rebuilds_the_same_module(kind: str) -> None:
    for module in (ENCODERS[kind](), DECODERS[kind](Gaussian(0.5, learned=True, bounded=False))):
        config = json.loads(json.dumps(module.config))
        assert config == module.config
        twin = type(module)(**config)
        assert twin.config == module.config
        twin.load_state_dict(module.state_dict())  # strict: same names and shapes
        x = torch.rand(3, *(module.event_shape if hasattr(module, "mean_head") else (5,)))
        torch.testing.assert_close(twin(x).mean, module(x).mean, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_conv_config_holds_every_option(options: dict) -> None:
    encoder = ConvEncoder(6, 1, 28, **options)
    for name, value in options.items():
        assert encoder.config[name] == (list(value) if isinstance(value, tuple) else value)
    assert str(ConvEncoder(**encoder.config)) == str(encoder)


def test_changing_a_config_leaves_the_module_alone() -> None:
    encoder = ConvEncoder(6)
    encoder.config["widths"].append(7)
    encoder.config["latent_dim"] = 9
    assert encoder.config["latent_dim"] == 6 and 7 not in encoder.config["widths"]


def test_posterior_starts_near_the_prior_and_survives_extreme_features() -> None:
    encoder = ConvEncoder(6, 1, 28)
    std = encoder(torch.rand(8, 1, 28, 28)).stddev
    assert std.min() > 0.5 and std.max() < 2.0
    for bias in (-1e4, 1e4):
        nn.init.constant_(encoder.std_head.bias, bias)
        posterior = encoder(torch.rand(8, 1, 28, 28))
        kl = torch.distributions.kl_divergence(posterior, Independent(Normal(torch.zeros(6), torch.ones(6)), 1))
        gradients = torch.autograd.grad(kl.sum(), list(encoder.parameters()))
        assert torch.isfinite(kl).all() and all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvEncoder(4, 3, 30), r"divisible by 4, got 30 x 30.*32 x 32"),
        (lambda: ConvDecoder(4, 3, (28, 27)), r"divisible by 4, got 28 x 27.*28 x 28"),
        (lambda: ConvEncoder(4, 3, (28, 28, 3)), r"\(height, width\)"),
        (lambda: ConvEncoder(0), r"latent_dim must be at least 1, got 0"),
        (lambda: ConvEncoder(4, 0), r"channels must be at least 1"),
        (lambda: ConvEncoder(4, widths=()), r"widths must hold at least 1"),
        (lambda: ConvEncoder(4, widths=(8, 0)), r"widths\[1\] must be at least 1"),
        (lambda: ConvEncoder(4, widths=(8, 8), strides=(1,)), r"each of the 2 widths, got \[1\]"),
        (lambda: ConvEncoder(4, widths=(8,), strides=(3,)), r"1 or a 2"),
        (lambda: ConvEncoder(4, widths=(8,), strides=(2,), local=True), r"stride 1, got strides \[2\]"),
        (lambda: ConvEncoder(4, residual=-1), r"residual must be at least 1"),
        (lambda: ConvEncoder(4, local=True, architecture="paper"), r"architecture='paper' fixes"),
        (lambda: ConvEncoder(4, skip=True, architecture="paper"), r"architecture='paper' fixes"),
        (lambda: ConvEncoder(4, skip=True), r"skip=True needs hidden layers"),
        (lambda: ConvDecoder(4, skip=True), r"skip=True needs hidden layers"),
        (lambda: ConvEncoder(4, kernel_size=4), r"odd.*got 4"),
        (lambda: ConvEncoder(4, patch_size=3), r"1, 2, 4 or 8, got 3"),
        (lambda: ConvEncoder(4, image_size=28, patch_size=8), r"28 x 28 cannot be cut into patches of 8 x 8"),
        (lambda: ConvEncoder(4, activation="swish"), r"unknown activation 'swish'.*'silu'"),
        (lambda: ConvEncoder(4, architecture="resnet"), r"unknown architecture 'resnet'.*'paper'"),
        (lambda: ConvEncoder(4, widths=(8, 8), architecture="paper"), r"five widths.*\[8, 8\]"),
        (lambda: ConvEncoder(4, hidden=(8,), architecture="paper"), r"architecture='paper' fixes"),
        (lambda: ConvDecoder(4, upsample="nearest"), r"unknown upsample 'nearest'.*'transpose'"),
        (lambda: ConvDecoder(4, initial_mean=1.0), r"strictly inside, got 1.0"),
        (lambda: ConvEncoder.paper(4, width=0), r"width must be at least 1"),
        (lambda: MLPEncoder(0, 4), r"in_features must be at least 1"),
        (lambda: MLPDecoder(4, ()), r"out_features must hold at least 1"),
        (lambda: MLPDecoder(4, 8, likelihood="poisson"), r"unknown likelihood 'poisson'.*'bernoulli', 'gaussian'"),
    ],
)
def test_bad_values_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvEncoder(4.0), r"latent_dim must be an integer, got 4.0"),
        (lambda: ConvEncoder(4, widths=32), r"widths must be a sequence of integers.*got 32"),
        (lambda: MLPEncoder(8, True), r"latent_dim must be an integer, got True"),
        (lambda: ConvDecoder(4, likelihood=0.5), r"likelihood must be .* got float"),
    ],
)
def test_bad_types_are_named(make, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_bad_inputs_are_named_before_any_work() -> None:
    encoder, decoder = ConvEncoder(4, 3, 28), ConvDecoder(4, 3, 28)
    with pytest.raises(ValueError, match=r"frames must have the shape \[\*batch, 3, 28, 28\], got \[2, 1, 28, 28\]"):
        encoder(torch.rand(2, 1, 28, 28))
    with pytest.raises(ValueError, match=r"got \[2, 3, 32, 32\]"):
        encoder(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"got \[28, 28\]"):
        encoder(torch.rand(28, 28))
    with pytest.raises(TypeError, match=r"floating point, got torch.uint8.*frames.float\(\) / 255"):
        encoder(torch.zeros(2, 3, 28, 28, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"torch.float64 but .* torch.float32"):
        encoder(torch.rand(2, 3, 28, 28, dtype=torch.float64))
    with pytest.raises(TypeError, match="must be a tensor, got ndarray"):
        encoder(torch.rand(2, 3, 28, 28).numpy())
    with pytest.raises(ValueError, match=r"latents must have the shape \[\*batch, 4\], got \[2, 5\]"):
        decoder(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"got \[\]"):
        decoder.mean(torch.tensor(1.0))


def test_autocast_takes_single_precision_modules() -> None:
    encoder = ConvEncoder(4, 3, 28)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = encoder(torch.rand(2, 3, 28, 28, dtype=torch.bfloat16))
    assert torch.isfinite(posterior.mean).all()


def test_a_tiny_autoencoder_learns(generator: torch.Generator) -> None:
    frames = (
        (torch.rand(8, 1, 4, 4, generator=generator) > 0.5).float().repeat_interleave(4, -1).repeat_interleave(4, -2)
    )
    encoder, decoder = ConvEncoder(8, 1, 16, (16,)), ConvDecoder(8, 1, 16, (16,))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-2)
    for _ in range(200):
        loss = -decoder(encoder(frames).mean).log_prob(frames).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * 256 * math.log(2)
