"""What users may expect of every model: shapes, precision, parts used twice, batches of a DataLoader, clear refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import flowfactor as ff
from flowfactor.models import METHODS

SHAPE, K, D = (1, 8, 8), 2, 4


def vae(**settings: object) -> ff.models.FlowFactorizedVAE:
    return ff.models.build_vae(SHAPE, K, D, hidden=(8, 8), **settings)


def sparse(**settings: object) -> ff.models.SparseTransformationVAE:
    return ff.models.build_sparse_vae(SHAPE, K, D, hidden=(8, 8), **settings)


def data() -> ff.data.TransformedImages:
    turns = {"turn": (ff.data.Rotate(), 0, 80), "grow": (ff.data.Scale(), 1, 1.5)}
    return ff.data.TransformedImages(torch.rand(8, *SHAPE), turns, steps=3)


@pytest.mark.parametrize("make", [vae, sparse])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_transform_puts_time_behind_the_batch(make, batch: tuple[int, ...]) -> None:
    model = make().eval()
    x0 = torch.rand(*batch, *SHAPE)
    with torch.no_grad():
        frames = model.transform(x0, [0.0, 1.0, 2.0], 1)
        assert frames.shape == (*batch, 3, *SHAPE)
        flat = model.transform(x0.reshape(-1, *SHAPE), [0.0, 1.0, 2.0], 1)
    torch.testing.assert_close(frames.reshape(flat.shape), flat)


def test_batches_of_a_dataloader_fit() -> None:
    batch = next(iter(DataLoader(data(), batch_size=4)))
    model = vae().eval()
    g = torch.Generator()
    found = model(batch["frames"], batch["t"], batch["k"], generator=g.manual_seed(0)).loss
    torch.testing.assert_close(
        found, model(batch["frames"], batch["t"][0], batch["k"], generator=g.manual_seed(0)).loss
    )
    with pytest.raises(ValueError, match="one time a frame"):
        model(batch["frames"], batch["t"][:3], batch["k"])


@pytest.mark.parametrize("make", [vae, sparse])
def test_frames_that_are_none_are_named(make) -> None:
    frames, t, k = torch.rand(3, 3, *SHAPE), torch.arange(3.0), torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="at least one sequence"):
        make()(frames[:0], t, k[:0])
    frames[1, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="frames hold NaN or infinity"):
        make()(frames, t, k)


@pytest.mark.parametrize("make", [vae, sparse])
def test_lazy_regularizers_come_in_a_share_of_steps_and_keep_their_mean(make) -> None:
    lazy, always = (make(regularize_every=n, hj_weight=1.0, start_weight=1.0) for n in (3, 1))
    always.load_state_dict(lazy.state_dict())
    frames, t, k = torch.rand(4, 5, 1, 8, 8), torch.arange(5.0), torch.tensor([0, 0, 1, 1])
    taken = 0
    with torch.no_grad():
        for seed in range(240):
            ours, plain = (
                model.train()(frames, t, k, generator=torch.Generator().manual_seed(seed)) for model in (lazy, always)
            )
            times = 3 * bool(ours.hj)
            torch.testing.assert_close(torch.stack([ours.hj, ours.start]), times * torch.stack([plain.hj, plain.start]))
            torch.testing.assert_close(ours.bound, plain.bound)
            torch.testing.assert_close(ours.loss, plain.loss + (times - 1) * (plain.hj + plain.start))
            taken += times > 0
        assert abs(taken - 80) < 5 * (240 * 2 / 9) ** 0.5
        evaluated = (model.eval()(frames, t, k, generator=torch.Generator().manual_seed(0)) for model in (lazy, always))
        torch.testing.assert_close(*(terms.hj for terms in evaluated))


@pytest.mark.parametrize(
    ("build", "more"), [(ff.models.build_vae, {}), (ff.models.build_sparse_vae, {"warmup_steps": 0})]
)
@pytest.mark.parametrize("shape", [SHAPE, (3, 8, 12)])
def test_relative_weights_count_by_the_values_of_a_frame(build, more, shape: tuple[int, ...]) -> None:
    given = {"hidden": (8, 8), "hj_weight": 0.02, "start_weight": 0.5, **more}
    model, plain = (build(shape, K, D, relative_weights=relative, **given) for relative in (True, False))
    size = math.prod(shape)
    plain.load_state_dict(model.state_dict())
    frames, t, k = torch.rand(4, 5, *shape), torch.arange(5.0), torch.tensor([0, 0, 1, 1])
    terms, absolute = (m.train()(frames, t, k, generator=torch.Generator().manual_seed(0)) for m in (model, plain))
    torch.testing.assert_close(terms.bound, absolute.bound)
    torch.testing.assert_close(absolute.loss, 0.02 * absolute.hj + 0.5 * absolute.start - absolute.bound)
    torch.testing.assert_close(terms.loss, size * (0.02 * terms.hj + 0.5 * terms.start) - terms.bound)
    assert model.penalty_unit == size and plain.penalty_unit == 1 and bool(terms.start > 0)


def test_relative_weights_are_kept_and_need_the_size_of_a_frame(tmp_path: Path) -> None:
    for make in (vae, sparse):
        folder = make(relative_weights=True).save_pretrained(tmp_path / make.__name__)
        assert ff.models.load_pretrained(folder).relative_weights is True

    class Silent(torch.nn.Module):
        def forward(self, z):
            return z

    flow = vae().flow
    with pytest.raises(ValueError, match=r"relative_weights=True counts .* does not say its event_shape"):
        ff.models.FlowFactorizedVAE(torch.nn.Flatten(), Silent(), flow, relative_weights=True)
    assert ff.models.FlowFactorizedVAE(torch.nn.Flatten(), Silent(), flow).penalty_unit == 1
    with pytest.raises(TypeError, match=r"relative_weights must be True or False, got 0\.1"):
        vae(relative_weights=0.1)


@pytest.mark.parametrize("make", [vae, sparse])
def test_without_regularizers_nothing_is_drawn_for_them(make) -> None:
    nothing = {"hj_weight": 0.0, "start_weight": 0.0}
    frames, t, k = torch.rand(4, 5, 1, 8, 8), torch.arange(5.0), torch.tensor([0, 0, 1, 1])
    ends = []
    for every in (1, 3):
        generator = torch.Generator().manual_seed(0)
        make(regularize_every=every, **nothing).train()(frames, t, k, generator=generator)
        ends.append(generator.get_state())
    assert torch.equal(*ends)


@pytest.mark.parametrize("make", [vae, sparse])
def test_lazy_regularizers_are_counted_in_whole_steps(make) -> None:
    with pytest.raises(ValueError, match="regularize_every must be at least 1, got 0"):
        make(regularize_every=0)
    with pytest.raises(TypeError, match=r"regularize_every must be an integer, got 1\.5"):
        make(regularize_every=1.5)


@pytest.mark.parametrize("make", [vae, sparse])
def test_models_come_back_in_their_precision(make, tmp_path: Path) -> None:
    model = make().double()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_part_that_is_used_twice_can_be_saved(tmp_path: Path) -> None:
    model = vae(augment_dim=0)
    potential = ff.potentials.MLPPotential(D, K, (8, 8))
    field = ff.fields.HelmholtzField(potential, potential, skew="canonical")
    model = ff.models.FlowFactorizedVAE(model.encoder, model.decoder, ff.LatentFlow(field))
    model.save_pretrained(tmp_path)
    x0 = torch.rand(2, *SHAPE)
    loaded = ff.models.FlowFactorizedVAE.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.transform(x0, [0.0, 1.0], 1), model.eval().transform(x0, [0.0, 1.0], 1))


def test_an_error_leaves_the_saved_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vae()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        next(model.parameters()).add_(1)
    monkeypatch.setattr(type(model), "config", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_annealing_counts_steps_of_training_alone() -> None:
    model = vae(supervision="weak", num_frames=3).train()
    frames, t = torch.rand(4, 3, *SHAPE), torch.arange(3.0)
    model(frames, t)
    with torch.no_grad():
        model(frames, t)
    assert model.estimator is not None and int(model.estimator.step) == 1


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.labels == "unused"])
def test_methods_that_infer_nothing_say_so(name: str) -> None:
    model = METHODS[name].build(SHAPE, K, D)
    with pytest.raises(ValueError, match="does not infer k"):
        model.infer_factor(torch.rand(2, 3, *SHAPE))
