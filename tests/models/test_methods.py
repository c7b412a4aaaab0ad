"""What every method of comparison has to do, whatever its model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from baseline_cases import SMALL, batch

import flowfactor as ff
from flowfactor.models import METHODS, build_model, get_method, load_pretrained

FLOWS = ("ours", "ours-weak", "sta", "free", "euler-no-pde")


def make(name: str, **options):
    torch.manual_seed(0)
    small: dict = {"hidden": (8, 8)} if name in (*FLOWS, "factor-vae") else {}
    if name == "sta":
        small["warmup_steps"] = 0  # while it lasts, only a part of the model learns
    return build_model(name, (1, 8, 8), 2, 8, num_frames=5, **SMALL, **small, **options)


def terms_of(model, name: str, **options):
    frames, t, k = batch()
    return model(frames, t, None if METHODS[name].labels == "inferred" else k, **options)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_finite_and_every_parameter_learns(name: str) -> None:
    model = make(name)
    terms = terms_of(model, name)
    assert all(bool(torch.isfinite(value)) for value in terms.as_dict().values())
    terms.loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    assert model.num_flows == 2


@pytest.mark.parametrize("name", METHODS)
def test_draws_come_from_the_generator(name: str) -> None:
    model = make(name)
    losses = [terms_of(model, name, generator=torch.Generator().manual_seed(seed)).loss for seed in (3, 3, 4)]
    if name not in ("ours-weak", "sta"):  # their temperatures move on with every step
        assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = make(name).eval()
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert type(again) is type(model) and again.config() == model.config() and not again.training
    frames, t, k = batch()
    torch.testing.assert_close(again.transform(frames[:, 0], t, k), model.transform(frames[:, 0], t, k))
    one, two = (terms_of(m, name, generator=torch.Generator().manual_seed(0)) for m in (model, again))
    torch.testing.assert_close(one.loss, two.loss)


@pytest.mark.parametrize("name", METHODS)
def test_transforming_begins_with_the_reconstruction_and_follows_the_control(name: str) -> None:
    model = make(name).eval()
    frames, t, k = batch()
    made = model.transform(frames[:, 0], t, k)
    assert made.shape == frames.shape and bool((made >= 0).all()) and bool((made <= 1).all())
    torch.testing.assert_close(made[:, 0], model.decode(model.encode(frames[:, 0]).mean))
    for control in (0, 1, torch.tensor([[0.5, 0.5]]).expand(6, 2), ff.Schedule([(0.0, 0), (2.0, 1)])):
        assert model.transform(frames[:, 0], t, control).shape == frames.shape
    differs = not torch.equal(model.transform(frames[:, 0], t, 0), model.transform(frames[:, 0], t, 1))
    moves = not torch.equal(made[:, 0], made[:, 1])
    assert differs == moves == METHODS[name].transforms


@pytest.mark.parametrize("name", METHODS)
def test_the_likelihood_is_a_bound_that_tightens(name: str) -> None:
    model = make(name).eval()
    frames, t, k = batch()
    k = None if METHODS[name].labels == "inferred" else k
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        repeats = 60
        elbo = torch.stack([model(frames, t, k, generator=generator).bound for _ in range(repeats)])
        draws = (model.log_likelihood(frames, t, k, 1, generator=generator).mean() for _ in range(repeats))
        one = torch.stack(list(draws))
        many = model.log_likelihood(frames, t, k, 128, generator=generator)
    assert many.shape == (6,)
    if name == "ours-weak":  # with one sample its k is summed out exactly: above the ELBO
        assert float(one.mean()) >= float(elbo.mean()) - 0.5
    elif name != "sta":  # whose relaxed spikes give another draw of the weights
        error = float((elbo.std() ** 2 + one.std() ** 2).sqrt() / repeats**0.5)
        assert float(elbo.mean()) == pytest.approx(float(one.mean()), abs=5 * error + 1e-3)
    assert float(many.mean()) > float(one.mean())


@pytest.mark.parametrize("name", METHODS)
def test_the_metrics_take_it(name: str) -> None:
    data = ff.data.TransformedImages(
        torch.rand(3, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40), "grow": (ff.data.Scale(), 1, 1.5)}, steps=4
    )
    model = make(name)
    assert bool(torch.isfinite(ff.metrics.equivariance_error(model, data).mean).all())
    bound = ff.metrics.log_likelihood(model, data, samples=2)
    assert bound.objective == model.objective and bound.count == 6 and model.training


@pytest.mark.parametrize("name", METHODS)
def test_bad_input_is_told(name: str) -> None:
    model = make(name)
    frames, t, k = batch()
    given = None if METHODS[name].labels == "inferred" else k
    with pytest.raises(TypeError, match="float"):
        model((frames * 255).byte(), t, given)
    with pytest.raises(ValueError, match="shape"):
        model(frames[:, 0], t, given)
    with pytest.raises(ValueError, match="one time a frame"):
        model(frames, t[:-1], given)
    if given is not None:
        with pytest.raises(ValueError, match="one index a sequence"):
            model(frames, t, k[:-1])
        with pytest.raises(ValueError, match="flow"):
            model(frames, t, k + 1)
    with pytest.raises(ValueError, match="flow"):
        model.transform(frames[:, 0], t, 2)
    with pytest.raises(ValueError, match=r"increas|monoton|differ"):
        model.transform(frames[:, 0], [0.0, 2.0, 1.0], 0)
    with pytest.raises(ValueError, match="samples"):
        model.log_likelihood(frames, t, given, 0)
    with pytest.raises(TypeError, match="samples"):
        model.log_likelihood(frames, t, given, 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_an_omitted_k_is_told_by_those_that_look_at_it(name: str) -> None:
    model = make(name)
    frames, t, _ = batch()
    for use in (lambda: model(frames, t, None), lambda: model.log_likelihood(frames, t, samples=1)):
        if METHODS[name].labels == "given":
            with pytest.raises(ValueError, match=r"\bk\b"):
                use()
        else:
            use()


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name != "po-flow"]
)  # which decodes two, whatever this says
def test_frames_per_step_is_a_count(name: str) -> None:
    with pytest.raises(ValueError, match="frames_per_step must be at least"):
        make(name, frames_per_step=0)
    for wrong in (True, 2.0):
        with pytest.raises(TypeError, match="frames_per_step must be an integer"):
            make(name, frames_per_step=wrong)


def test_unknown_methods_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'vea'.*ours.*po-flow"):
        get_method("vea")
    with pytest.raises(ValueError, match="unknown method"):
        build_model("nothing")


def test_a_method_is_what_its_name_says() -> None:
    assert type(make("free").flow.field).__name__ == "FreeField"
    without = make("euler-no-pde")
    assert without.flow.solver.method == "euler" and without.hj_weight == without.start_weight == 0
    with pytest.raises(ValueError, match="by definition"):
        make("free", field="gradient")
    with pytest.raises(ValueError, match="num_frames"):
        build_model("ours-weak", (1, 8, 8), 2, 8)
    assert make("topographic-vae").supervised and not make("topographic-vae", supervised=False).supervised
    assert all(method.title and method.source for method in METHODS.values())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model": "Trojan", "parts": {}, "settings": {}}')
    with pytest.raises(ValueError, match=r"Trojan.*FlowFactorizedVAE"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="not the config"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_shared_options_are_shared(name: str) -> None:
    model = make(name, frames_per_step=2, likelihood="gaussian")
    assert model.decoder.likelihood.name == "gaussian"
    assert getattr(model, "frames_per_step", 2) == 2
    assert bool(torch.isfinite(terms_of(model, name).loss))


@pytest.mark.parametrize("name", ["ours", "sta", "euler-no-pde", "free"])
def test_where_a_flow_leads_does_not_depend_on_the_times_asked_for(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, (1, 8, 8), 2, 4)
    z, control = torch.randn(3, model.flow.dim), 1
    every = model.flow(z, torch.arange(9.0), control).z[-1]
    torch.testing.assert_close(model.flow(z, [0.0, 8.0], control).z[-1], every)
    torch.testing.assert_close(model.flow(z, [0.0, 4.0, 8.0], control).z[-1], every)
