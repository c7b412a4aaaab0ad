"""The flow-factorized model: its bounds, its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flowfactor as ff
from flowfactor.objectives import choose_frames, sequence_log_likelihood


def _model(**settings):
    torch.manual_seed(0)
    return ff.models.build_vae((1, 8, 8), 2, 4, hidden=(8, 8), **settings)


def _batch():
    return torch.rand(6, 5, 1, 8, 8), torch.arange(5), torch.tensor([0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("objective", ["path", "marginal"])
@pytest.mark.parametrize("field", ["helmholtz", "gradient", "free"])
def test_every_parameter_learns(objective: str, field: str) -> None:
    model = _model(objective=objective, field=field, prior="diffusion" if objective == "marginal" else "normal")
    model(*_batch()).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("objective", ["path", "marginal"])
def test_importance_weights_tighten_the_bound(objective: str) -> None:
    model = _model(objective=objective, solver={"method": "rk4"}).eval()
    frames, t, k = _batch()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        elbo = torch.stack([model(frames, t, k, generator=g).bound for _ in range(200)]).mean()
        one = torch.stack([model.log_likelihood(frames, t, k, 1, generator=g).mean() for _ in range(200)]).mean()
        many = model.log_likelihood(frames, t, k, 256, generator=g).mean()
    assert float(elbo) == pytest.approx(float(one), abs=0.5)
    assert many > elbo


def test_chosen_frames_are_unbiased() -> None:
    index, weight = choose_frames(9, 2, 40_000, torch.device("cpu"), torch.Generator().manual_seed(0))
    share = torch.bincount(index.flatten(), minlength=9) / 40_000 * weight
    torch.testing.assert_close(share, torch.ones(9), atol=0.05, rtol=0)


@pytest.mark.parametrize("field", ["helmholtz", "gradient", "free"])
def test_saved_and_loaded(tmp_path: Path, field: str) -> None:
    model = _model(field=field, prior="diffusion").eval()
    model.save_pretrained(tmp_path)
    again = ff.models.FlowFactorizedVAE.from_pretrained(tmp_path)
    frames, t, k = _batch()
    torch.testing.assert_close(again.transform(frames[:, 0], t, k), model.transform(frames[:, 0], t, k))
    assert again.config() == model.config()


def test_files_name_no_code(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("encoders.ConvEncoder", "os.system"))
    with pytest.raises(ValueError, match="does not have"):
        ff.models.FlowFactorizedVAE.from_pretrained(tmp_path)


def test_equivariance_error_of_a_perfect_model() -> None:
    data = ff.data.TransformedImages(torch.rand(5, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)

    class Perfect:
        num_flows = 1

        def transform(self, x0, t, control):
            found = [(x0[i] - data.batch([j], 0)["frames"][0, 0]).abs().sum() for i in range(len(x0)) for j in range(5)]
            index = torch.stack(found).reshape(len(x0), 5).argmin(1)
            return data.batch(index, 0)["frames"]

    error = ff.metrics.equivariance_error(Perfect(), data)
    assert float(error.mean) == 0.0 and float(error.doing_nothing) > 1.0 and error.count == 5


def test_all_paths_of_a_sequence_are_judged_by_the_same_frames() -> None:
    torch.manual_seed(0)
    decoder, frames, z = ff.encoders.ConvDecoder(4, 1, 8), torch.rand(6, 5, 1, 8, 8), torch.randn(5, 6, 4)
    row = torch.arange(6).repeat(2)
    with torch.no_grad():
        first, second = sequence_log_likelihood(decoder, frames, z[:, row], wanted=1, row=row).reshape(2, 6)
        torch.testing.assert_close(first, second)
        whole = torch.stack([decoder(z[t]).log_prob(frames[:, t]) for t in range(5)]).sum(0)
        torch.testing.assert_close(sequence_log_likelihood(decoder, frames, z), whole)
        drawn = torch.stack([sequence_log_likelihood(decoder, frames, z, wanted=2) for _ in range(400)])
    assert bool(((drawn.mean(0) - whole).abs() < 5 * drawn.std(0) / 20 + 1e-3).all())
