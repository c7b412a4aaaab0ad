"""How flows move, and whether a model is the flow of its field: against paths that are known."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

import flowfactor as ff
from flowfactor.cli.runs import draw
from flowfactor.cli.train import table
from flowfactor.training import evaluate

FIGURES = (ff.metrics.gradient_share, ff.metrics.arc_over_chord, ff.metrics.translation_share, ff.metrics.solver_gap)
PIXELS = 16
ENGINES = ("general", "closed form")


def data_of(count: int = 6, steps: int = 4, flows: int = 2, **more) -> ff.data.Sequences:
    frames = torch.rand(count * flows, steps + 1, 1, 4, 4, generator=torch.Generator().manual_seed(count))
    return ff.data.Sequences(frames, torch.arange(count * flows) % flows, **more)


def with_field(model, field, **solver):
    """A model whose latents are its pixels, along another field."""
    model.flow = ff.LatentFlow(field, ff.Solver(**solver))
    return model


def quadratic(*scales: float) -> ff.potentials.QuadraticPotential:
    """K potentials s_k |z|^2 / 2."""
    return ff.potentials.QuadraticPotential(
        PIXELS, num_flows=len(scales), S=torch.tensor(scales)[:, None, None] * torch.eye(PIXELS)
    )


def mixed(sources: tuple[float, ...], turns: tuple[float, ...], **more) -> ff.fields.HelmholtzField:
    """v = a_k z + b_k J z."""
    return ff.fields.HelmholtzField(quadratic(*sources), quadratic(*turns), skew="canonical", **more)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradients_share_of_sources_and_turns_is_known(pixel_model, engine) -> None:
    field = mixed((0.3, 0.2), (0.1, -0.4))
    model = with_field(pixel_model(), field, method="rk4", engine=engine) if engine == "general" else None
    model = model or with_field(pixel_model(), field, method="rk4")
    found = ff.metrics.gradient_share(model, data_of(), batch_size=4)
    # Both parts are orthogonal, and in one ratio wherever they are.
    assert found.mean.tolist() == pytest.approx([0.09 / 0.1, 0.04 / 0.2], abs=1e-6)
    assert found.standard_error.tolist() == pytest.approx([0, 0], abs=1e-6) and found.count == 6
    json.dumps(found.as_dict())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradients_share_of_a_flow_that_does_not_turn_is_one(pixel_model, engine) -> None:
    chosen = {"engine": engine} if engine == "general" else {}
    quadratics = with_field(pixel_model(), mixed((0.3, 0.2), (0.1, -0.4), turning=[1]), method="rk4", **chosen)
    assert ff.metrics.gradient_share(quadratics, data_of()).mean.tolist() == [1.0, pytest.approx(0.2, abs=1e-6)]
    parts = ff.potentials.MLPPotential(PIXELS, 2, (8, 8)), ff.fields.SolenoidalField(PIXELS, 2, 8)
    share = ff.metrics.gradient_share(
        with_field(pixel_model(), ff.fields.HelmholtzField(*parts, turning=[0])), data_of()
    )
    assert share.mean[0] < 1 and share.mean[1] == 1 and share.standard_error[1] == 0


def test_a_share_stays_one_where_parts_cancel_and_is_one_without_another_part(pixel_model) -> None:
    there, turned, half = torch.zeros(PIXELS), torch.zeros(PIXELS, PIXELS), torch.zeros(PIXELS)
    there[0], turned[0, 1], turned[1, 0], half[1] = 2.0, -1.0, 1.0, 1.0  # J (0, 1, ...) = (-1, 0, ...)
    flat = torch.zeros(PIXELS, PIXELS)
    u, h = (ff.potentials.QuadraticPotential(PIXELS, S=flat, b=b) for b in (there, half))
    model, data = pixel_model(1), data_of(flows=1)
    field = ff.fields.HelmholtzField(u, h, skew=turned)
    torch.testing.assert_close(field(torch.zeros(1, PIXELS), 0.0)[0], there / 2)
    assert float(ff.metrics.gradient_share(with_field(model, field), data).mean) == pytest.approx(4 / 5)
    assert float(ff.metrics.gradient_share(with_field(model, ff.fields.GradientField(u)), data).mean) == 1


@pytest.mark.parametrize("field", [ff.fields.FreeField(PIXELS, 2), ff.fields.SkewGradientField(quadratic(1.0, 1.0))])
def test_fields_without_potential_have_no_share(pixel_model, field) -> None:
    with pytest.raises(ValueError, match=f"{type(field).__name__}, which has no potential"):
        ff.metrics.gradient_share(with_field(pixel_model(), field), data_of())


@pytest.mark.parametrize("engine", ENGINES)
def test_arcs_of_circles_over_their_chords(pixel_model, engine) -> None:
    turns = ff.fields.SkewGradientField(quadratic(0.25, -0.5), skew="canonical")
    chosen = {"engine": engine} if engine == "general" else {}
    found = ff.metrics.arc_over_chord(with_field(pixel_model(), turns, **chosen), data_of())
    known = [angle / (2 * math.sin(angle / 2)) for angle in (1.0, 2.0)]  # over 4 frames
    assert found.mean.tolist() == pytest.approx(known, rel=1e-4)
    straight = ff.metrics.arc_over_chord(
        with_field(pixel_model(), ff.fields.GradientField(quadratic(0.2, -0.3))), data_of()
    )
    assert straight.mean.tolist() == pytest.approx([1, 1], rel=1e-4)


class Turning:
    """A model with a path and no flow: it turns pixels 0 and 1 by 90 degrees a frame."""

    num_flows = 1

    def __init__(self, encode) -> None:
        self.encode = encode

    def path(self, z0, t, control):
        angle = t[:, None] * torch.pi / 2
        turned = z0.expand(len(t), *z0.shape).clone()
        turned[..., 0] = angle.cos() * z0[:, 0] - angle.sin() * z0[:, 1]
        turned[..., 1] = angle.sin() * z0[:, 0] + angle.cos() * z0[:, 1]
        return turned


def test_a_path_without_flow_is_a_polygon(pixel_model) -> None:
    data = data_of(steps=2, flows=1)
    found = ff.metrics.arc_over_chord(Turning(pixel_model().encode), data)
    assert float(found.mean) == pytest.approx(2**0.5, rel=1e-5)  # two sides of a square over its diagonal
    with pytest.raises(ff.metrics.NoLatentFlowError, match="a Turning has no latent flow"):
        ff.metrics.gradient_share(Turning(pixel_model().encode), data)
    with pytest.raises(ff.metrics.NoLatentFlowError, match="a Turning has no latent flow"):
        ff.metrics.solver_gap(Turning(pixel_model().encode), data)


def test_the_share_of_a_translation(pixel_model) -> None:
    """A flow that only tells the time has 1; one that scales has the share that the mean has of the starts."""
    data = data_of(count=7)
    shifts = ff.metrics.translation_share(pixel_model(), data, batch_size=3)
    assert shifts.mean.tolist() == pytest.approx([1, 1]) and shifts.count == 7
    assert shifts.standard_error.tolist() == pytest.approx([0, 0], abs=1e-6)
    scaled = ff.metrics.translation_share(
        with_field(pixel_model(), ff.fields.GradientField(quadratic(0.2, -0.3))), data
    )
    for k in range(2):
        z0 = data.batch(list(range(k, 14, 2)))["frames"][:, 0].flatten(1)
        known = z0.mean(0).square().sum() / z0.square().sum(1).mean()
        assert float(scaled.mean[k]) == pytest.approx(float(known), rel=1e-5)


def test_the_share_of_a_translation_sums_over_frames_and_may_look_at_codes_alone(pixel_model) -> None:
    """Sample b moves by (1, 0) in the first frame, then by (0, +-1): squares of sums 1 + 1, and 1 + 2 in the mean."""
    encode = pixel_model().encode

    def path(z0, t, control):
        sign = torch.where(torch.arange(len(z0)) % 2 == 0, 1.0, -1.0)
        moved = torch.zeros(3, *z0.shape)
        moved[1:, :, 0] = 1
        moved[2, :, 1] = sign
        return z0 + moved

    model = SimpleNamespace(num_flows=1, encode=encode, path=path, code_dim=1)
    data = data_of(steps=2, flows=1)
    assert float(ff.metrics.translation_share(model, data).mean) == pytest.approx(2 / 3)
    assert float(ff.metrics.translation_share(model, data, coded=True).mean) == pytest.approx(1)


@pytest.mark.parametrize("measure", [ff.metrics.translation_share, ff.metrics.arc_over_chord, ff.metrics.solver_gap])
def test_standard_errors_of_ratios_are_their_spread(pixel_model, measure) -> None:
    """Against the spread over many data sets."""
    model = with_field(pixel_model(1), ff.fields.SkewGradientField(quadratic(0.3), skew="canonical"), method="rk4")
    if measure is ff.metrics.arc_over_chord:  # whose ratio is the same for all samples of one turn

        def bent(z, t):
            return torch.stack([z[:, 0], t, *[torch.zeros_like(t)] * (PIXELS - 2)], -1)

        model = with_field(pixel_model(1), ff.fields.from_module(bent, PIXELS), method="rk4")
    elif measure is ff.metrics.solver_gap:
        model = with_field(pixel_model(1), ff.fields.GradientField(quadratic(0.4)), method="euler")
    found = [measure(model, ff.data.Sequences(torch.rand(40, 3, 1, 4, 4), [0] * 40)) for _ in range(100)]
    spread = float(torch.cat([one.mean for one in found]).std())
    claimed = float(torch.cat([one.standard_error for one in found]).mean())
    assert claimed == pytest.approx(spread, rel=0.3) and spread > 1e-4


def test_the_gap_of_euler_steps_is_known(pixel_model) -> None:
    rates, t = torch.tensor([0.2, -0.3]), torch.arange(1, 5)
    model = with_field(pixel_model(), ff.fields.GradientField(quadratic(*rates.tolist())), method="euler")
    data = data_of()
    gap = ff.metrics.solver_gap(model, data, batch_size=4)
    for k, rate in enumerate(rates):
        frames = data.batch(list(range(k, 12, 2)))["frames"]
        z0 = frames[:, :1]
        steps, exact = ((1 + rate) ** t)[None, :, None, None, None], (rate * t).exp()[None, :, None, None, None]
        own, accurate = ((frames[:, 1:] - factor * z0).abs().sum((1, 2, 3, 4)).mean() for factor in (steps, exact))
        assert float(gap.own[k]) == pytest.approx(float(own), rel=1e-5)
        assert float(gap.accurate[k]) == pytest.approx(float(accurate), rel=1e-5)
        assert float(gap.mean[k]) == pytest.approx(float(accurate / own - 1), abs=1e-5)
        known = (steps - exact).abs().sum() / (exact - 1).abs().sum()
        assert float(gap.path[k]) == pytest.approx(float(known), rel=1e-4)
    assert bool((gap.low < gap.mean).all()) and gap.tolerance == pytest.approx(1.19e-6, rel=0.01)
    json.dumps(gap.as_dict())
    assert model.flow.solver.method == "euler"  # it was another flow that was solved accurately


def test_a_loose_solver_of_the_training_is_seen_beside_that_of_the_evaluation(pixel_model) -> None:
    field = ff.fields.GradientField(quadratic(0.2, -0.3))
    data, coarse = data_of(), ff.Solver("euler", step_size=1.0)
    both, fine = with_field(pixel_model(), field), with_field(pixel_model(), field, rtol=1e-6, atol=1e-6)
    loose = with_field(pixel_model(), field, method="euler")
    both.flow = ff.LatentFlow(field, coarse, evaluation_solver=fine.flow.solver)
    gap, *alone = (ff.metrics.solver_gap(model, data) for model in (both.train(), fine, loose))
    assert both.training and gap.own.tolist() == alone[0].own.tolist() and gap.path.tolist() == alone[0].path.tolist()
    torch.testing.assert_close(gap.training, alone[1].mean)
    torch.testing.assert_close(gap.training_path, alone[1].path)
    assert float(gap.mean.abs().max()) < 1e-5 < 1e-2 < float(gap.training.abs().min())
    for one in alone:
        assert one.training.tolist() == one.mean.tolist() and one.training_path.tolist() == one.path.tolist()
    assert gap.as_dict()["training"] == gap.training.tolist()
    assert both.flow.solver is coarse and both.flow.evaluation_solver is fine.flow.solver


def test_an_accurate_solver_has_no_gap(pixel_model) -> None:
    field = ff.fields.GradientField(quadratic(0.2, -0.3))
    gap = ff.metrics.solver_gap(with_field(pixel_model(), field, rtol=1e-6, atol=1e-6), data_of())
    assert float(gap.path.max()) < 1e-5 and float(gap.mean.abs().max()) < 1e-5
    with pytest.raises(ValueError, match="tolerance must be positive"):
        ff.metrics.solver_gap(pixel_model(), data_of(), tolerance=0)


def test_missing_frames_count_for_nothing_in_a_gap(pixel_model) -> None:
    seen, k = torch.ones(8, 5, dtype=torch.bool), torch.arange(8) % 2
    seen[:, 3] = False
    frames = torch.rand(8, 5, 1, 4, 4)
    data = ff.data.Sequences(frames, k, mask=seen)
    other = frames.clone()
    other[:, 3] = 5.0
    one, two = (ff.metrics.solver_gap(pixel_model(), ff.data.Sequences(x, k, mask=seen)) for x in (frames, other))
    assert one.own.tolist() == two.own.tolist() and len(data) == 8
    whole = ff.metrics.solver_gap(pixel_model(), ff.data.Sequences(frames, k))
    assert bool((whole.own > one.own).all())


@pytest.mark.parametrize("measure", FIGURES)
def test_matched_flows_have_the_figures_of_their_own(pixel_model, measure) -> None:
    field = mixed((0.3, 0.2), (0.1, -0.4))
    frames = torch.rand(6, 1, 1, 4, 4).expand(6, 5, 1, 4, 4).repeat(2, 1, 1, 1, 1)  # the same under both flows
    data = ff.data.Sequences(frames, [0] * 6 + [1] * 6)
    model = with_field(pixel_model(), field, method="rk4")
    plain = measure(model, data)
    matched = measure(ff.metrics.MatchedModel(model, torch.tensor([1, 0])), data)
    torch.testing.assert_close(plain.mean.flip(0), matched.mean)
    if measure is not ff.metrics.translation_share:  # that of the starts under every linear flow
        assert abs(float(plain.mean[0] - plain.mean[1])) > 1e-4 * abs(float(plain.mean[0]))


@pytest.mark.parametrize("measure", FIGURES)
def test_what_has_no_figure_is_refused(pixel_model, measure) -> None:
    with pytest.raises(ValueError, match="3 flows and the data set 2"):
        measure(with_field(pixel_model(3), ff.fields.GradientField(quadratic(1.0, 1.0, 1.0))), data_of())
    rest = with_field(pixel_model(), ff.fields.GradientField(quadratic(0.1, 0.0)))
    with pytest.raises(ValueError, match="flow 1 moves nothing"):
        measure(rest, data_of())


@pytest.mark.parametrize("measure", FIGURES)
def test_times_and_contexts_of_each_sequence_reach_the_flow(pixel_model, measure) -> None:
    """Of sequences that differ in these alone, each has other figures."""
    torch.manual_seed(0)
    u, h = (
        ff.potentials.MLPPotential(PIXELS, context=1, rank=0, init_scale=scale, time_scale=1.0) for scale in (1.0, 2.0)
    )
    model = with_field(pixel_model(1), ff.fields.HelmholtzField(u, h), method="rk4")
    frames = torch.rand(1, 4, 1, 4, 4)
    found = [
        float(measure(model, ff.data.Sequences(frames, [0], t=torch.tensor([t]), context=torch.tensor([[c]]))).mean)
        for t, c in (([0.0, 0.5, 1.5, 2.0], 3.0), ([0.0, 1.0, 2.0, 5.0], 3.0), ([0.0, 0.5, 1.5, 2.0], -3.0))
    ]
    if measure is not ff.metrics.translation_share:  # one sample has no other
        assert min(abs(found[0] - found[1]), abs(found[0] - found[2])) > 1e-3 * abs(found[0])
    apart = {"t": torch.tensor([[0.0, 0.5, 1.5, 2.0], [0.0, 1.0, 2.0, 5.0]]), "context": torch.tensor([[3.0], [-3.0]])}
    both = measure(model, ff.data.Sequences(frames.expand(2, -1, -1, -1, -1), [0, 0], **apart))
    assert both.count == 2 and float(both.standard_error) > 1e-4


def test_an_evaluation_tells_how_flows_move_and_what_has_no_such_figure(pixel_model, capsys) -> None:
    model, data = with_field(pixel_model(), mixed((0.3, 0.2), (0.1, -0.4)), method="euler"), data_of()
    found = evaluate(model, data, likelihood_limit=0, path_limit=4, seed=3)
    assert found["gradient_share"]["mean"] == pytest.approx([0.9, 0.2])
    for name, measure in zip(("arc_over_chord", "translation_share", "solver_gap"), FIGURES[1:], strict=True):
        assert found[name] == measure(model, data, limit=4, seed=3).as_dict() and found[name]["count"] == 4
    assert evaluate(model, data, likelihood_limit=0, limit=2)["solver_gap"]["count"] == 2
    assert evaluate(model, data, likelihood_limit=0, path_limit=0)["solver_gap"] == {"missing": "not asked for"}
    lines = table(found).splitlines()
    assert " ".join(lines[4].split()) == "how it moves grad u's share arc/chord same for all E_k if accurate"
    assert lines[5].split()[:2] == ["flow_0", "0.90"] and lines[5].endswith(f"{found['solver_gap']['mean'][0]:+.1%}")
    found["solver_gap"]["training"] = [0.5, -0.25]  # as where another solver evaluates
    lines = table(found).splitlines()
    assert lines[4].endswith("E_k if accurate  from training's")
    assert lines[5].endswith("+50.0%") and lines[6].endswith("-25.0%")
    model = with_field(model, ff.fields.FreeField(PIXELS, 2))
    bare = evaluate(model, data, likelihood_limit=0)
    assert "FreeField, which has no potential" in bare["gradient_share"]["missing"]
    assert "grad u's share" not in table(bare) and "arc/chord" in table(bare)
    vae = ff.models.build_baseline("vae", (1, 8, 8), 2, 4)
    sequences = ff.data.Sequences(torch.rand(4, 3, 1, 8, 8), [0, 1] * 2)
    without = evaluate(vae, sequences, likelihood_limit=0)
    assert "a VAE has no latent flow" in without["translation_share"]["missing"] and "moves" not in table(without)


def test_a_traversal_tells_what_the_potential_carries_of_each_flow(pixel_model, monkeypatch, tmp_path) -> None:
    titles = []
    monkeypatch.setattr("flowfactor.plot.save", lambda figure, path: titles.append(figure.axes[0].get_title()))
    model, data = with_field(pixel_model(), mixed((0.3, 0.2), (0.1, -0.4)), method="rk4"), data_of()
    model.decode = lambda z: model.decoder.mean(z).clamp(0, 1)
    draw(model, data, tmp_path / "picture.png", images=1)
    monkeypatch.setattr("flowfactor.metrics.matched.flow_names", lambda *_: ("flow_1", "flow_0"))
    draw(model, data, tmp_path / "picture.png", images=1)  # as if the flows had been found, the second first
    draw(with_field(model, ff.fields.FreeField(PIXELS, 2)), data, tmp_path / "picture.png", images=1)
    told = ["carried by grad u: flow_0 90%, flow_1 20%", "carried by grad u: flow_1 90%, flow_0 20%", ""]
    assert titles == told


def test_flows_that_cannot_be_solved_accurately_are_told(pixel_model, monkeypatch) -> None:
    """A field that jumps everywhere: no step is small enough, and the accurate solve gives up soon."""
    monkeypatch.setattr("flowfactor.metrics.accuracy._MOST_STEPS", 50)

    def rough(z, t):
        return 1e3 * torch.sign(torch.sin(1e4 * z))

    model = with_field(pixel_model(1), ff.fields.from_module(rough, PIXELS), method="euler")
    model.scale = torch.nn.Parameter(torch.ones(()))  # an evaluation asks a parameter where the model is
    found = evaluate(model, data_of(count=2, flows=1), likelihood_limit=0)
    assert "50" in found["solver_gap"]["missing"] and "mean" in found["arc_over_chord"]
