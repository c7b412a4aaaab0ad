"""Codes tied to their flow by ``code_weight``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowfactor as ff
from flowfactor.models.inputs import Inputs
from flowfactor.models.tie import code_error, other_frames

SHAPE, K, D = (1, 8, 8), 2, 4
FRAMES, KS, TIMES = torch.rand(4, 4, *SHAPE), torch.tensor([0, 1, 1, 0]), torch.arange(4.0)
EULER = {"method": "euler", "step_size": 1.0}


def build(kind: str = "vae", **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"hidden": (8, 8), "solver": EULER, "code_weight": 10.0, **settings}
    if kind == "vae":
        return ff.models.build_vae(SHAPE, K, D, **settings)
    return ff.models.build_sparse_vae(SHAPE, K, D, **{"warmup_steps": 0, **settings})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counted(module: nn.Module) -> list[Any]:
    """What a module is called with from now on."""
    calls: list[Any] = []
    module.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    return calls


@pytest.mark.parametrize("room", [0, 3])
@pytest.mark.parametrize("training", [True, False])
def test_the_term_is_the_distance_from_the_path_to_the_code(room: int, training: bool) -> None:
    """Of two frames the other is the second: no draw but that of z_0, one Euler step, and one more frame encoded."""
    model = build(augment_dim=room, frames_per_step=1).train(training)
    found = model(FRAMES[:, :2], TIMES[:2], KS, generator=seeded()).code
    z = ff.objectives.draw(model.encode(FRAMES[:, 0]), generator=seeded())
    z = z + model.flow.velocity(z, 0.0, KS)
    expected = (z - model.encode(FRAMES[:, 1]).mean)[:, :D].square().sum(-1).mean()
    torch.testing.assert_close(found, expected)
    assert z.shape[-1] == D + room


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    ("kind", "more"), [("vae", {}), ("sparse", {}), ("sparse", {"warmup_steps": 5}), ("sparse", {"control": "double"})]
)
def test_the_loss_has_it_in_every_step(kind: str, more: dict[str, Any], relative: bool) -> None:
    tied, bare = (
        build(kind, relative_weights=relative, regularize_every=3, code_weight=weight, **more).train()
        for weight in (10.0, 0.0)
    )
    for seed in range(4):
        ours, plain = (model(FRAMES, TIMES, KS, generator=seeded(seed)) for model in (tied, bare))
        assert bool(ours.code > 0) and not bool(plain.code)
        unit = 64 if relative else 1
        torch.testing.assert_close(ours.loss - plain.loss, unit * 10 * ours.code, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(ours.bound, plain.bound)  # the bound itself has no penalty


def test_no_second_solve_and_one_more_frame_a_sequence() -> None:
    model = build(supervision="weak", num_frames=4, estimator="enumerate")
    solves, encoded = counted(model.flow), counted(model.encoder)
    model(FRAMES, TIMES, generator=seeded())
    assert len(solves) == 1 and len(solves[0]) == K * len(FRAMES)
    assert [len(x) for x in encoded] == [len(FRAMES)] * 2
    model.code_weight = 0.0
    model(FRAMES, TIMES, generator=seeded())
    assert len(encoded) == 3 and len(solves) == 2


@pytest.mark.parametrize("kind", ["vae", "sparse"])
def test_its_gradient_reaches_the_encoder_and_the_flow(kind: str) -> None:
    model = build(kind)
    model(FRAMES, TIMES, KS, generator=seeded()).code.backward()
    for part in (model.encoder, model.flow):
        assert max(float(p.grad.abs().max()) for p in part.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in model.decoder.parameters())
    # The code of the other frame alone, with the path held: the encoder learns where the flow arrives.
    model.zero_grad()
    given = Inputs(FRAMES, TIMES)
    code_error(model, given, torch.zeros(4, 4, D), seeded()).sum().backward()
    assert any(float(p.grad.abs().max()) > 0 for p in model.encoder.parameters() if p.grad is not None)


def test_terms_of_inferred_flows_are_expectations(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []
    mean = ff.models.SequenceTerms.mean
    monkeypatch.setattr(ff.models.SequenceTerms, "mean", lambda one: pieces.append(one) or mean(one))
    model = build(supervision="weak", num_frames=4).eval()
    for k in (None, 0, 1):
        model(FRAMES, TIMES, k, generator=seeded())
    weak, *each = (piece.code for piece in pieces)
    torch.testing.assert_close(weak, (model.infer_factor(FRAMES).probs * torch.stack(each, -1)).sum(-1))


@pytest.mark.parametrize("estimator", ["balanced", "gumbel", "enumerate"])
def test_every_estimator_trains_with_it(estimator: str) -> None:
    model = build(supervision="weak", num_frames=4, estimator=estimator).train()
    terms = model(FRAMES, TIMES, generator=seeded())
    terms.loss.backward()
    assert bool(terms.code > 0)


def test_another_frame_is_any_that_was_observed_but_the_first() -> None:
    mask = torch.tensor([[True, True, True, True], [True, False, True, False], [True, False, False, False]])
    given = Inputs(FRAMES[:3], TIMES, mask=mask)
    drawn = [other_frames(given, seeded(seed)) for seed in range(40)]
    index = torch.stack([i for i, _ in drawn])
    assert set(index[:, 0].tolist()) == {1, 2, 3} and set(index[:, 1].tolist()) == {2}
    assert all(found.tolist() == [True, True, False] for _, found in drawn)
    reference = torch.tensor([2, 2, 0])
    index = torch.stack([other_frames(given, seeded(seed), reference)[0] for seed in range(40)])
    assert set(index[:, 0].tolist()) == {0, 1, 3} and set(index[:, 1].tolist()) == {0}
    shares = torch.stack([other_frames(Inputs(FRAMES, TIMES), seeded(seed))[0] for seed in range(300)]).flatten()
    assert all(abs(float((shares == s).float().mean()) - 1 / 3) < 0.07 for s in (1, 2, 3))


@pytest.mark.parametrize("kind", ["vae", "sparse"])
def test_missing_frames_are_not_compared_with(kind: str) -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:2, 1], mask[2:, 2:] = False, False
    model, frames = build(kind).eval(), FRAMES.clone()
    encoded = counted(model.encoder)
    for seed in range(5):
        encoded.clear()
        model(frames, TIMES, KS, mask=mask, generator=seeded(seed))
        (other,) = encoded[1:]
        match = (other.unsqueeze(1) == frames).flatten(2).all(2)
        assert bool((match & mask)[:, 1:].any(1).all()) and int(match.sum()) == len(frames)
    alone = model(frames[:1], TIMES, KS[:1], mask=torch.tensor([[True, False, False, False]]), generator=seeded())
    assert not bool(alone.code)


def test_times_of_each_sequence() -> None:
    model = build(solver={"method": "rk4"})
    common, own = (
        model(FRAMES, t, KS, generator=seeded()).code for t in (TIMES, TIMES.expand(4, 4) + 1e-6 * KS[:, None])
    )
    torch.testing.assert_close(own, common, rtol=1e-3, atol=1e-5)


def test_a_single_frame_has_nothing_to_be_compared_with() -> None:
    terms = build()(FRAMES[:, :1], TIMES[:1], KS, generator=seeded())
    assert not bool(terms.code) and bool(terms.loss.isfinite())


def test_training_by_it_lowers_the_latent_error() -> None:
    """Codes that follow their flow, within the frames that it was trained on."""
    torch.manual_seed(0)
    turn = {"turn": (ff.data.Rotate(), 0, 60)}
    data = ff.data.TransformedImages(torch.rand(12, 1, 8, 8), turn, steps=3)
    batch = data.batch(torch.arange(12), torch.zeros(12, dtype=torch.long))

    def error(weight: float) -> float:
        torch.manual_seed(0)
        model = ff.models.build_vae(SHAPE, 1, D, hidden=(16, 16), solver=EULER, code_weight=weight)
        step = torch.optim.Adam(model.parameters(), lr=1e-2)
        for seed in range(25):
            step.zero_grad()
            model(batch["frames"], batch["t"], batch["k"], generator=seeded(seed)).loss.backward()
            step.step()
        return float(ff.metrics.latent_equivariance_error(model, data).mean)

    assert error(30.0) < 0.7 * error(0.0)


@pytest.mark.parametrize("kind", ["vae", "sparse"])
def test_saved_models_remember_it(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    build(kind, code_weight=7.0).save_pretrained(tmp_path)
    kept = type(build(kind)).from_pretrained(tmp_path)
    assert kept.code_weight == 7
    config = json.loads((tmp_path / "config.json").read_text())
    del config["settings"]["code_weight"]  # as releases before it wrote it
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(kept).from_pretrained(tmp_path).code_weight == 0


@pytest.mark.parametrize("value", [-1.0, float("inf"), "10"])
def test_a_weight_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="code_weight must be a finite number"):
        build(code_weight=value)


@pytest.mark.parametrize("method", ["vae", "slow-vae", "po-flow", "topographic-vae"])
def test_methods_without_it_refuse_it_by_name(method: str) -> None:
    with pytest.raises((TypeError, ValueError), match="code_weight"):
        ff.models.build_model(method, SHAPE, K, D, num_frames=4, code_weight=1.0)


def test_room_at_rest_is_left_out() -> None:
    model = build(augment_dim=3)
    z: Tensor = torch.zeros(4, 4, D + 3)
    far = z.clone()
    far[..., D:] = 100.0
    given = Inputs(FRAMES, TIMES)
    one, two = (code_error(model, given, states, seeded()) for states in (z, far))
    torch.testing.assert_close(one, two)
    assert bool((one > 0).all())
