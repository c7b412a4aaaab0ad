"""Models whose flows a context steers: where it enters, what is refused, and that it is told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfactor as ff

SHAPE, K, D, B, T = (1, 8, 8), 2, 4, 6, 4
# Steps of their own length: under a norm over the batch, sequences share their steps, and differ by tolerance.
STEPS = {"method": "euler", "step_size": 1.0}
SMALL: dict[str, Any] = {
    "hidden": (8, 8), "encoder": {"widths": (4,)}, "decoder": {"widths": (4,)}, "solver": STEPS, "hj_weight": 1.0,
}  # fmt: skip
NAMED = {"pose": 2, "speed": 1}


def vae(context: Any = 2, **settings: Any) -> ff.models.FlowFactorizedVAE:
    return ff.models.build_vae(
        SHAPE, K, D, context=context, generator=torch.Generator().manual_seed(0), **SMALL | settings
    )


def weak(context: Any = 2, **settings: Any) -> ff.models.FlowFactorizedVAE:
    factor = {"widths": (4,), "hidden": (4,)}
    return vae(context, supervision="weak", num_frames=T + 1, factor_encoder=factor, **settings)


def sparse(context: Any = 2, **settings: Any) -> ff.models.SparseTransformationVAE:
    pairs = {"widths": (4,), "hidden": (4,)}
    return ff.models.build_sparse_vae(SHAPE, K, D, context=context, pair_encoder=pairs, **SMALL | settings)


MODELS = {
    "supervised": vae,
    "helmholtz": lambda context=2: vae(context, field="helmholtz"),
    "marginal": lambda context=2: vae(context, objective="marginal", prior="diffusion", field="helmholtz"),
    "balanced": weak,
    "enumerate": lambda context=2: weak(context, estimator="enumerate"),
    "gumbel": lambda context=2: weak(context, estimator="gumbel"),
    "sparse": sparse,
    "sparse, double control": lambda context=2: sparse(context, control="double", warmup_steps=0),
    "free": lambda context=2: vae(context, field="free"),
    "gradient": lambda context=2: vae(context, field="gradient", potential="resnet"),
}


def shown(context: Any = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Frames, times, k and a context."""
    g = torch.Generator().manual_seed(seed)
    frames = torch.rand(B, T + 1, *SHAPE, generator=g)
    made: Any = torch.randn(B, 2, generator=g)
    if isinstance(context, dict):
        made = {name: torch.randn(B, size, generator=g) for name, size in context.items()}
    return frames, torch.arange(T + 1.0), torch.arange(B) % K, made


def given_k(model: Any, k: Tensor) -> Tensor | None:
    return k if model.supervision == "full" else None


@pytest.mark.parametrize("name", MODELS)
def test_a_context_steers_every_model(name: str) -> None:
    """It reaches the loss with a gradient, in training and in evaluation, each sequence by its own row."""
    frames, t, k, context = shown()
    model = MODELS[name]()
    for mode in (True, False):
        model.train(mode)
        leaf = context.clone().requires_grad_()
        g = torch.Generator().manual_seed(1)
        loss = model(frames, t, given_k(model, k), context=leaf, generator=g).loss
        (slope,) = torch.autograd.grad(loss, leaf)
        assert bool((slope != 0).any(1).all())
    bound = model.log_likelihood(
        frames, t, given_k(model, k), 2, context=context, generator=torch.Generator().manual_seed(1)
    )
    moved = model.log_likelihood(
        frames, t, given_k(model, k), 2, context=context.index_fill(0, torch.tensor([2]), 3.0),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert (bound != moved).tolist() == [row == 2 for row in range(B)]


def test_the_start_is_at_rest_under_the_context() -> None:
    frames, t, k, context = shown()
    model = vae().eval()
    found = model(frames, t, k, context=context, generator=torch.Generator().manual_seed(0)).start
    z0 = ff.objectives.draw(model.encode(frames[:, 0]), generator=torch.Generator().manual_seed(0))
    slope = model.flow.field.potential.derivatives(z0, 0.0, k, context=context).gradient
    torch.testing.assert_close(found, slope.square().sum(-1).mean())


@pytest.mark.parametrize("name", ["supervised", "sparse"])
def test_transforming_and_rows(name: str) -> None:
    frames, t, k, context = shown()
    model = MODELS[name]().eval()
    made = model.transform(frames[:, 0], t, k, context=context)
    alone = model.transform(frames[3:4, 0], t, k[3:4], context=context[3:4])
    torch.testing.assert_close(alone[0], made[3], rtol=1e-4, atol=1e-5)
    other = model.transform(frames[:, 0], t, k, context=context.flip(0))
    assert not torch.allclose(other[:, 1:], made[:, 1:])
    torch.testing.assert_close(other[:, 0], made[:, 0])  # the encoder and the decoder do not see it
    same = model.transform(frames[:, 0], t, k, context=context[0])  # one for all
    torch.testing.assert_close(same, model.transform(frames[:, 0], t, k, context=context[0].expand(B, 2)))
    path = model.path(model.encode(frames[:, 0]).mean, t, k, context=context)
    torch.testing.assert_close(model.decode(path).movedim(0, 1), made)


@pytest.mark.parametrize("name", MODELS)
def test_missing_unexpected_and_wrong_contexts_are_told(name: str) -> None:
    frames, t, k, context = shown()
    steered, plain = MODELS[name](), MODELS[name](0)
    kind = type(steered).__name__
    wide = torch.randn(B, 3)
    calls = (
        lambda model, **also: model(frames, t, given_k(model, k), **also),
        lambda model, **also: model.log_likelihood(frames, t, given_k(model, k), 1, **also),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"{kind} was built with context=2 and got none"):
            call(steered)
        with pytest.raises(ValueError, match=f"{kind} takes no context and got one"):
            call(plain, context=context)
        with pytest.raises(ValueError, match=r"context must have 2 features, shape \[\*batch, 2\]; got \[6, 3\]"):
            call(steered, context=wide)
        with pytest.raises(ValueError, match="does not fit a batch"):
            call(steered, context=context[:4])
        with pytest.raises(TypeError, match="float64"):
            call(steered, context=context.double())
    with pytest.raises(ValueError, match="with context=2 and got none"):
        steered.transform(frames[:, 0], t, 0)
    with pytest.raises(ValueError, match="takes no context"):
        plain.transform(frames[:, 0], t, 0, context=context)


def test_named_contexts() -> None:
    frames, t, k, context = shown(NAMED)
    model = vae(NAMED).eval()
    joined = vae(3).eval()
    joined.load_state_dict(model.state_dict())
    both = torch.cat([context["pose"], context["speed"]], 1)
    swapped = dict(reversed(context.items()))
    losses = [
        one(frames, t, k, context=other, generator=torch.Generator().manual_seed(0)).loss
        for one, other in ((model, context), (joined, both), (model, swapped))
    ]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
    weak(NAMED)(frames, t, context=context).loss.backward()
    with pytest.raises(ValueError, match="lacks 'speed'"):
        model(frames, t, k, context={"pose": context["pose"]})
    with pytest.raises(ValueError, match="knows no context 'sped'"):
        model(frames, t, k, context={**context, "sped": context["speed"]})


@pytest.mark.parametrize("context", [2, NAMED])
@pytest.mark.parametrize("make", [vae, sparse])
def test_saved_models_keep_it(make: Any, context: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="needs the extra io")
    frames, t, k, given = shown(context)
    model = make(context).eval()
    model.save_pretrained(tmp_path)
    loaded = ff.models.load_pretrained(tmp_path)
    assert loaded.context == context
    torch.testing.assert_close(
        loaded.transform(frames[:, 0], t, k, context=given), model.transform(frames[:, 0], t, k, context=given)
    )


@pytest.mark.parametrize("name", ff.models.baselines.BASELINES)
def test_baselines_refuse_it_by_name(name: str) -> None:
    frames, t, k, context = shown()
    settings = {"latent_dim": 8, "num_frames": T + 1}
    model = ff.models.build_baseline(name, SHAPE, K, **settings)
    kind, mask = type(model).__name__, torch.ones(B, T + 1, dtype=torch.bool)
    for also, what in (({"context": context}, "context"), ({"mask": mask}, "mask")):
        with pytest.raises(ValueError, match=f"a {kind} takes no {what}"):
            model(frames, t, k, **also)
        with pytest.raises(ValueError, match=f"a {kind} takes no {what}"):
            model.log_likelihood(frames, t, k, 1, **also)
    with pytest.raises(ValueError, match=f"a {kind} takes no context"):
        model.transform(frames[:, 0], t, 0, context=context)
    own = t * torch.linspace(0.5, 1, B)[:, None]
    for call in (lambda: model(frames, own, k), lambda: model.log_likelihood(frames, own, k, 1)):
        with pytest.raises(ValueError, match=f"a {kind} takes times that all sequences share"):
            call()
    with pytest.raises(ValueError, match=f"a {kind} takes times that all images share"):
        model.transform(frames[:, 0], own, 0)
    with pytest.raises(ValueError, match="has no setting context"):
        ff.models.build_baseline(name, SHAPE, K, **settings, context=2)


def test_a_potential_that_takes_none_is_told() -> None:
    class Bowl(ff.potentials.Potential):
        def __init__(self, dim, num_flows=1):
            super().__init__(dim, num_flows)

        def flow_potential(self, z, t, k):
            return -z.square().sum(-1)

    from flowfactor import registry

    registry.register("potential", "plain-bowl", Bowl)
    try:
        with pytest.raises(ValueError, match=r"context=2 is asked for, but the field 'gradient' .* takes none"):
            vae(field="gradient", potential="plain-bowl")
        assert vae(0, field="gradient", potential="plain-bowl").context == 0
    finally:
        registry._KNOWN["potential"].pop("plain-bowl")


def data(context: Any = 2) -> ff.data.Sequences:
    frames, _, k, given = shown(context)
    return ff.data.Sequences(frames, k, context=given)


@pytest.mark.parametrize("name", ["supervised", "enumerate", "sparse"])
def test_the_loss_of_a_batch_is_that_of_a_call(name: str) -> None:
    model, batch = MODELS[name]().eval(), data().batch(range(B))
    k = given_k(model, batch["k"])
    called = model(
        batch["frames"], batch["t"], k, context=batch["context"], generator=torch.Generator().manual_seed(0)
    ).loss
    assert torch.equal(model.loss(batch, generator=torch.Generator().manual_seed(0)), called)
    with pytest.raises(ValueError, match="a VAE takes no context"):
        ff.models.build_baseline("vae", SHAPE, K, 4).loss(batch)


def test_measures_and_plots_take_the_context_of_data() -> None:
    model = vae(augment_dim=0).eval()
    sequences = data()
    batch = sequences.batch(range(B))
    made = model.transform(batch["frames"][:, 0], batch["t"], batch["k"], context=batch["context"])
    per_image = (batch["frames"][:, 1:] - made[:, 1:]).abs().flatten(1).sum(1)
    expected = torch.stack([per_image[batch["k"] == flow].mean() for flow in range(K)])
    torch.testing.assert_close(ff.metrics.equivariance_error(model, sequences).mean, expected)
    matched = ff.metrics.MatchedModel(model, torch.tensor([1, 0]))
    assert ff.metrics.latent_equivariance_error(matched, sequences).mean.shape == (K,)
    for measure in (ff.metrics.log_likelihood, ff.metrics.paper_log_likelihood):
        assert measure(model, sequences).count == B
        with pytest.raises(ValueError, match="got none"):
            measure(model, ff.data.Sequences(batch["frames"], batch["k"]))
    x0 = batch["frames"][:, 0]
    ff.metrics.vp_score(model, x0, [0, 1], context=batch["context"], steps=1, repeats=2)
    curve = ff.metrics.extrapolation_error(
        model, batch["frames"], batch["t"], batch["k"], context=batch["context"], batch_size=4
    )
    torch.testing.assert_close(curve.mean.sum(), per_image.mean())
    picture = ff.plot.traverse(model, x0[:2], steps=1, context=batch["context"][:2])
    plain = ff.plot.traverse(model, x0[:2], steps=1, context=batch["context"][0])
    whole, alone = ([torch.as_tensor(p)[2 + 10 * row : 10 + 10 * row] for row in range(4)] for p in (picture, plain))
    for row in range(4):  # of each flow that of the first picture, then of the second, whose context is another
        assert torch.allclose(whole[row], alone[row]) == (row % 2 == 0)
    assert len(ff.plot.traversal_frames(model, x0[:2], steps=1, context=batch["context"][:2])) == 8


def test_composed_flows_are_steered_too() -> None:
    frames, t, _, context = shown()
    weights = torch.rand(B, T, K)
    model = vae().eval()
    batch = {"frames": frames, "t": t, "weights": weights, "context": context}
    error = ff.metrics.composition_error(model, [batch])
    schedule = ff.data.weights_schedule(weights, t)
    made = model.transform(frames[:, 0], t, schedule, context=context)
    torch.testing.assert_close(torch.tensor(float(error)), (frames - made)[:, 1:].abs().flatten(1).sum(1).mean())


def turning(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bars that turn by so many degrees a frame, and that speed."""
    g = torch.Generator().manual_seed(seed)
    speed = torch.rand(count, generator=g) * 2 - 1
    start = torch.rand(count, 1, generator=g) * torch.pi
    angle = start + 0.5 * speed[:, None] * torch.arange(4.0)
    axis = torch.linspace(-1, 1, 12)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    off = x * angle.sin()[..., None, None] - y * angle.cos()[..., None, None]
    return torch.exp(-8 * off.square()).unsqueeze(2), speed[:, None]


def test_a_context_that_decides_the_motion_is_learned() -> None:
    """Trained on speeds that the context tells, the right context bounds the likelihood better than a permuted one."""
    frames, speed = turning(192, 0)
    torch.manual_seed(0)
    model = ff.models.build_vae(
        (1, 12, 12), 1, 6, context=1, hidden=(32, 32), hj_weight=0, start_weight=0,
        encoder={"widths": (16,)}, decoder={"widths": (16,)},
    )  # fmt: skip
    t, g = torch.arange(4.0), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(150):
        rows = torch.randint(len(frames), (48,), generator=g)
        optimiser.zero_grad()
        model(frames[rows], t, 0, context=speed[rows], generator=g).loss.backward()
        optimiser.step()
    frames, speed = turning(96, 1)
    model.eval()
    with torch.no_grad():
        right, wrong = (
            model(frames, t, 0, context=given, generator=torch.Generator().manual_seed(2)).loss
            for given in (speed, speed.roll(1, 0))
        )
    assert float(wrong - right) > 20, (float(right), float(wrong))
