"""The encoder of q(k|x)."""

from __future__ import annotations

import pytest
import torch

from flowfactor._config import describe, rebuild
from flowfactor.encoders import FactorEncoder


def _encoder(**options) -> FactorEncoder:
    return FactorEncoder(3, 4, **{"channels": 1, "image_size": 8, "widths": (8,), "hidden": (8,)} | options)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_one_categorical_a_sequence(batch: tuple[int, ...]) -> None:
    q = _encoder()(torch.rand(*batch, 4, 1, 8, 8))
    assert q.batch_shape == batch and q.logits.shape == (*batch, 3)
    torch.testing.assert_close(q.logits.exp().sum(-1), torch.ones(batch))


def test_sequences_are_judged_one_by_one() -> None:
    encoder, frames = _encoder(), torch.rand(5, 4, 1, 8, 8)
    each = torch.stack([encoder(x).logits for x in frames])
    torch.testing.assert_close(encoder(frames).logits, each)


def test_it_sees_every_frame_and_their_order() -> None:
    encoder, frames = _encoder(kernel_size=3), torch.rand(1, 4, 1, 8, 8, requires_grad=True)
    encoder(frames).logits[0, 0].backward()
    assert frames.grad is not None
    assert (frames.grad.flatten(2).abs().sum(-1) > 0).all()
    assert not torch.allclose(encoder(frames.flip(1)).logits, encoder(frames).logits)


def test_every_parameter_learns() -> None:
    encoder = _encoder()
    encoder(torch.rand(8, 4, 1, 8, 8)).log_prob(torch.arange(8) % 3).sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_directions_of_motion_are_told_apart() -> None:
    def moving(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, k = torch.rand(count, 1, 8, 8), torch.arange(count) % 3
        shifts = torch.tensor([[0, 1], [1, 0], [0, 0]])
        frames = [
            torch.stack([x.roll((t * shifts[i]).tolist(), (1, 2)) for x, i in zip(image, k, strict=True)])
            for t in range(4)
        ]
        return torch.stack(frames, 1), k

    encoder = _encoder(widths=(32,), hidden=(32,))
    optimizer = torch.optim.Adam(encoder.parameters(), 1e-2)
    frames, k = moving(300)
    for _ in range(60):
        optimizer.zero_grad()
        (-encoder(frames).log_prob(k).mean()).backward()
        optimizer.step()
    frames, k = moving(150)
    assert float((encoder(frames).probs.argmax(-1) == k).float().mean()) > 0.9


def test_its_config_rebuilds_it() -> None:
    encoder = FactorEncoder(2, 3, image_size=(16, 8), strides=(1, 2), widths=(4, 8), kernel_size=3, activation="silu")
    again = FactorEncoder(**encoder.config)
    again.load_state_dict(encoder.state_dict())
    frames = torch.rand(2, 3, 3, 16, 8)
    torch.testing.assert_close(again(frames).logits, encoder(frames).logits)
    assert again.config == encoder.config


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_frames": 1}, ValueError, "at least 2"),
        ({"num_flows": 0}, ValueError, "num_flows"),
        ({"num_frames": 4.0}, TypeError, "num_frames"),
        ({"image_size": 10}, ValueError, "divisible by 4"),
        ({"activation": "no"}, ValueError, "activation"),
        ({"kernel_size": 2}, ValueError, "odd"),
    ],
)
def test_wrong_settings_are_refused(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FactorEncoder(**{"num_flows": 2, "num_frames": 4, "image_size": 8} | options)


def test_wrong_sequences_are_refused() -> None:
    encoder = _encoder()
    with pytest.raises(ValueError, match="4, 1, 8, 8"):
        encoder(torch.rand(2, 5, 1, 8, 8))
    with pytest.raises(TypeError, match="255"):
        encoder(torch.zeros(2, 4, 1, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("few", [None, 2, 3])
def test_the_first_layer_sees_the_first_frame_and_the_changes(kernel_size: int, few: int | None) -> None:
    encoder = FactorEncoder(2, 5, 3, 16, kernel_size=kernel_size, frames_seen=few).double()
    frames = torch.rand(4, 5, 3, 16, 16, dtype=torch.float64)
    seen = frames[:, [round(i * 4 / (few - 1)) for i in range(few)]] if few else frames
    stacked = torch.cat([seen[:, :1], seen.diff(dim=1)], 1).flatten(1, 2)
    logits = encoder.head(encoder.body(stacked)).log_softmax(-1)
    torch.testing.assert_close(encoder(frames).logits, logits)


def test_it_sees_frames_from_first_to_last() -> None:
    torch.manual_seed(0)
    encoder = FactorEncoder(3, 6, channels=1, image_size=8, widths=(8,), hidden=(8,), frames_seen=3)
    assert FactorEncoder(**encoder.config).config == encoder.config
    frames = torch.rand(2, 6, 1, 8, 8)
    logits = encoder(frames).logits
    for index, seen in enumerate((True, False, True, False, False, True)):
        other = frames.clone()
        other[:, index] = 1 - other[:, index]
        assert torch.equal(encoder(other).logits, logits) is not seen


@pytest.mark.parametrize("few", [1, 7])
def test_it_cannot_see_one_frame_or_more_than_there_are(few: int) -> None:
    with pytest.raises(ValueError, match="frames_seen must lie between 2 and num_frames = 6"):
        FactorEncoder(3, 6, frames_seen=few)


def test_the_former_name_of_frames_seen_still_works_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="frames_seen"):
        encoder = FactorEncoder(3, 6, image_size=8, looks=3)
    assert encoder.config == FactorEncoder(3, 6, image_size=8, frames_seen=3).config
    with pytest.raises(ValueError, match="give one"):
        FactorEncoder(3, 6, looks=3, frames_seen=3)


def test_a_model_file_with_the_former_name_loads_without_a_warning() -> None:
    written = describe(FactorEncoder(3, 6, image_size=8, frames_seen=3))
    assert written is not None
    written["arguments"]["looks"] = written["arguments"].pop("frames_seen")
    rebuilt = rebuild(written)
    assert isinstance(rebuilt, FactorEncoder) and rebuilt.config["frames_seen"] == 3
