"""Parts of one's own, as a user writes them: named in settings, trained, saved, loaded where they are registered again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Independent, Normal

import flowfactor as ff
from flowfactor import registry

SIZES: dict[str, Any] = {"image_shape": (1, 8, 8), "num_flows": 2, "latent_dim": 4, "hidden": (8, 8)}
WEAK: dict[str, Any] = {**SIZES, "supervision": "weak", "num_frames": 5}


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    yield
    registry._KNOWN.clear()


def trained(model: ff.models.FlowFactorizedVAE, k: int | None = 0, steps: int = 3) -> ff.models.FlowFactorizedVAE:
    torch.manual_seed(0)
    optimizer, frames = torch.optim.Adam(model.parameters(), 1e-2), torch.rand(6, 5, 1, 8, 8)
    for _ in range(steps):
        optimizer.zero_grad()
        model(frames, torch.arange(5), k).loss.backward()
        optimizer.step()
    return model.eval()


def assert_same(one: ff.models.FlowFactorizedVAE, other: ff.models.FlowFactorizedVAE, k: int | None = 0) -> None:
    frames, t = torch.rand(3, 5, 1, 8, 8), torch.arange(5)
    terms = [m(frames, t, k, generator=torch.Generator().manual_seed(1)).as_dict() for m in (one, other)]
    for name, value in terms[0].items():
        torch.testing.assert_close(terms[1][name], value, rtol=0, atol=0)
    assert one.config() == other.config()


def test_a_potential_by_its_name(tmp_path: Path) -> None:
    @ff.register_potential("well")
    class Well(ff.potentials.Potential):
        def __init__(self, dim: int, num_flows: int = 1, *, depth: float = 1.0) -> None:
            super().__init__(dim, num_flows)
            self.depth, self.centres = depth, nn.Parameter(torch.randn(num_flows, dim))

        def flow_potential(self, z: torch.Tensor, t: torch.Tensor, k: int) -> torch.Tensor:
            return -0.5 * self.depth * (z - self.centres[k]).square().sum(-1)

    model = ff.models.build_vae(**SIZES, field="gradient", potential={"name": "well", "depth": 0.3})
    before = model.flow.field.potential.centres.clone()
    trained(model).save_pretrained(tmp_path)
    again = ff.models.load_pretrained(tmp_path)
    potential = again.flow.field.potential
    assert type(potential) is Well and potential.depth == 0.3 and not torch.equal(potential.centres[0], before[0])
    assert_same(model, again)
    assert (
        type(ff.models.build_vae(**SIZES, field="helmholtz", potential="well", skew="canonical").flow.field.potential)
        is Well
    )
    assert type(ff.models.build_model("po-flow", (1, 8, 8), 2, 4, potential="well").potential) is Well
    with pytest.raises(ValueError, match="potential 'well' has no setting deep; it has depth"):
        ff.models.build_vae(**SIZES, potential={"name": "well", "deep": 1})


def test_an_objective_of_one_method(tmp_path: Path) -> None:
    @ff.register_objective("tempered")
    class Tempered(ff.objectives.Objective):
        log_det = True

        def __init__(self, power: float = 1.0) -> None:
            self.power = power

        def divergence(self, start, prior, path, t, control):
            return self.power * (start - path.log_det[-1] - prior.at(float(t[-1]), control).log_prob(path.z[-1]))

    model = ff.models.build_vae(**SIZES, objective={"name": "tempered", "power": 0.5})
    assert model.flow.solver.method == "rk4"  # where the density of the path counts, as under "marginal"
    trained(model).save_pretrained(tmp_path)
    again = ff.models.load_pretrained(tmp_path)
    assert again.objective == "tempered" and again.objective.power == 0.5 and again.objective != Tempered(0.7)
    assert_same(model, again)
    doubled = ff.models.build_vae(**SIZES, objective=Tempered())
    doubled.load_state_dict(model.state_dict())
    frames, t = torch.rand(3, 5, 1, 8, 8), torch.arange(5)
    kl = [m.eval()(frames, t, 1, generator=torch.Generator().manual_seed(1)).kl for m in (model, doubled)]
    torch.testing.assert_close(2 * kl[0], kl[1])
    with pytest.raises(ValueError, match="objective tempered has no importance weights"):
        model.log_likelihood(frames, t, 0)
    weak = ff.models.build_vae(**WEAK, objective="tempered", estimator="enumerate")
    assert trained(weak, None)(frames, t).loss.isfinite()


def test_a_known_bound_written_as_ones_own_is_that_bound() -> None:
    class Sum(ff.objectives.Objective):
        log_det = True

        def divergence(self, start, prior, path, t, control):
            density = start - path.log_det
            return sum(density[s] - prior.at(float(t[s]), control).log_prob(path.z[s]) for s in range(len(t)))

    torch.manual_seed(0)
    model = ff.models.build_vae(**SIZES, objective="marginal", prior="diffusion").eval()
    parts = {name: getattr(model, name) for name in ("encoder", "decoder", "flow", "prior", "force")}
    own = ff.models.FlowFactorizedVAE(**parts, objective=Sum()).eval()
    frames, t, k = torch.rand(4, 5, 1, 8, 8), torch.arange(5), torch.tensor([0, 1, 1, 0])
    terms = [m(frames, t, k, generator=torch.Generator().manual_seed(1)) for m in (model, own)]
    torch.testing.assert_close(terms[1].loss, terms[0].loss)


def test_an_estimator_that_takes_its_own_expectation(tmp_path: Path) -> None:
    drawn = []

    @ff.register_estimator("score")
    class Score(ff.models.FactorEstimator):
        """The score-function estimator with a running baseline."""

        def __init__(self, weight: float = 0.1) -> None:
            super().__init__()
            self.weight = weight
            self.register_buffer("baseline", torch.zeros(()))

        def draw(self, batch: ff.models.FactorBatch) -> torch.Tensor:
            drawn.append(torch.multinomial(batch.log_q.exp(), 1, generator=batch.generator).squeeze(-1))
            return drawn[-1]

        def expectation(self, batch: ff.models.FactorBatch) -> ff.models.SequenceTerms:
            k = self.draw(batch)
            terms = batch.under(k)
            advantage = terms.loss.detach() - self.baseline
            self.baseline.lerp_(terms.loss.detach().mean(), 0.1)
            lesson = self.weight * advantage * batch.log_q.gather(-1, k.unsqueeze(-1)).squeeze(-1)
            return terms.with_factor(batch.divergence(batch.log_q) + lesson)

    model = ff.models.build_vae(**WEAK, estimator={"name": "score", "weight": 0.2})
    before = model.factor_encoder.head.weight.clone()
    trained(model, None).save_pretrained(tmp_path)
    assert len(drawn) == 3 and not torch.equal(model.factor_encoder.head.weight, before)
    again = ff.models.load_pretrained(tmp_path)
    assert type(again.estimator) is Score and again.estimator.weight == 0.2 and int(again.estimator.step) == 3
    assert torch.equal(again.estimator.baseline, model.estimator.baseline) and float(again.estimator.baseline) > 0
    assert_same(model, again, None)


def test_an_estimator_without_an_expectation_is_told() -> None:
    class Drawing(ff.models.FactorEstimator):
        def draw(self, log_q):
            return log_q

    with pytest.raises(NotImplementedError, match=r"Drawing must define expectation\(batch\)"):
        trained(ff.models.build_vae(**WEAK, estimator=Drawing()), None)


def test_every_other_part_by_its_name(tmp_path: Path) -> None:
    @ff.register_field("spin")
    class Spin(ff.fields.Field):
        def flow_velocity(self, z, t, k):
            return (k + 1) * z.flip(-1) * torch.tensor([-1.0, 1.0, -1.0, 1.0])

    @ff.register_prior("wide")
    class Wide(ff.priors.Prior):
        def __init__(self, dim: int, inner: ff.priors.Prior | None = None, width: float = 2.0) -> None:
            super().__init__(dim)
            self.width, self.inner = width, inner or ff.priors.GaussianMixture(dim, 3)

        def at(self, t, control=0):
            return Independent(Normal(self.inner.means[0], self.width), 1)

    @ff.register_encoder("small")
    class Small(nn.Module):  # no base of flowfactor's
        def __init__(self, latent_dim: int, channels: int, image_size: tuple[int, int], slope: float = 0.1) -> None:
            super().__init__()
            self.latent_dim, self.slope = latent_dim, slope
            self.layer = nn.Linear(channels * image_size[0] * image_size[1], latent_dim)

        def forward(self, x):
            return Independent(Normal(self.slope * self.layer(x.flatten(-3)), 1.0), 1)

    own = {"field": "spin", "prior": {"name": "wide", "width": 3.0}, "encoder": {"name": "small", "slope": 0.2}}
    model = ff.models.build_vae(**SIZES, **own)
    trained(model).save_pretrained(tmp_path)
    again = ff.models.load_pretrained(tmp_path)
    assert (type(again.flow.field), type(again.prior), type(again.encoder)) == (Spin, Wide, Small)
    assert again.prior.width == 3.0 and again.encoder.slope == 0.2
    assert_same(model, again)
    parts = {name: getattr(model, name) for name in ("encoder", "decoder", "flow")}
    nested = ff.models.FlowFactorizedVAE(**parts, prior=Wide(4, ff.priors.GaussianMixture(4, 2)))
    nested.save_pretrained(tmp_path)
    assert ff.models.load_pretrained(tmp_path).prior.inner.means.shape == (2, 4)


OWN_MODULE = """
import flowfactor as ff
@ff.register_potential("bowl")
class Bowl(ff.potentials.Potential):
    def flow_potential(self, z, t, k):
        return -0.5 * z.square().sum(-1)
"""


def test_a_saved_model_waits_for_its_parts_to_be_registered(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "own"}
    exec(OWN_MODULE, namespace)
    model = ff.models.build_vae(**SIZES, field="gradient", potential="bowl")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "own.py").write_text(OWN_MODULE)
    script = (
        "import flowfactor as ff\n"
        "try:\n    ff.models.load_pretrained('model')\n"
        "except ValueError as error:\n    print(error)\n"
        "import own\nprint(ff.models.load_pretrained('model').num_flows)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    message, flows = run.stdout.strip().splitlines()
    assert "names the potential 'bowl', which is not registered here: import the module" in message
    assert "@flowfactor.register_potential('bowl')" in message and "from_pretrained(directory, flow=...)" in message
    assert flows == "2"
    registry._KNOWN.clear()
    given = ff.models.FlowFactorizedVAE.from_pretrained(tmp_path / "model", flow=model.flow)
    assert type(given.flow.field.potential) is namespace["Bowl"]


def test_parts_that_are_not_registered_are_handed_over(tmp_path: Path) -> None:
    class Bound(ff.objectives.PathBound):
        pass

    class Estimator(ff.models.GumbelEstimator):
        pass

    model = ff.models.build_vae(**WEAK, objective=Bound(), estimator=Estimator(rate=0.5))
    model.save_pretrained(tmp_path)
    for part in ("estimator", "objective"):
        given: dict[str, Any] = {"objective": Bound(), "estimator": Estimator()}
        del given[part]
        with pytest.raises(
            ValueError, match=rf"{part} is a part of the user's own: .*{part}=\.\.\.\).*register"
        ) as told:
            ff.models.FlowFactorizedVAE.from_pretrained(tmp_path, **given)
        assert "config.json" in str(told.value)
    again = ff.models.FlowFactorizedVAE.from_pretrained(tmp_path, objective=Bound(), estimator=Estimator(rate=0.5))
    assert type(again.objective) is Bound and type(again.estimator) is Estimator
    assert again.config() == model.config()


def test_models_saved_before_objectives_were_objects_are_loaded(tmp_path: Path) -> None:
    model = ff.models.build_vae(
        **WEAK, objective="marginal", prior="diffusion", estimator={"name": "gumbel", "rate": 0.1}
    )
    config = json.loads((trained(model, None).save_pretrained(tmp_path) / "config.json").read_text())
    settings, parts = config["settings"], config["parts"]
    settings |= {"objective": parts.pop("objective")["name"], "estimator": parts.pop("estimator")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = ff.models.load_pretrained(tmp_path)
    assert again.objective == "marginal" and again.estimator.rate == 0.1
    assert_same(model, again, None)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("mlp", ValueError, "'mlp' of a potential is flowfactor's own: choose another one"),
        ("taken", ValueError, "'taken' of a potential is already that of <class .*First'>: choose another one"),
        ("two words", ValueError, "must be a letter, then letters, digits, '-' or '_', got 'two words'"),
        ("", ValueError, "got ''"),
        (3, TypeError, r'a string, got 3: @register_potential\("my-potential"\)'),
    ],
)
def test_names_are_checked(name: Any, error: type[Exception], message: str) -> None:
    @ff.register_potential("taken")
    class First(ff.potentials.Potential):
        pass

    class Second(ff.potentials.Potential):
        pass

    with pytest.raises(error, match=message):
        ff.register_potential(name)(Second)
    assert dict(registry.registered("potential")) == {"taken": First}


def test_a_class_may_be_registered_again_and_is_of_its_kind() -> None:
    for _ in range(2):  # as a cell of a notebook that is run twice

        @ff.register_potential("again")
        class Again(ff.potentials.Potential):
            pass

    assert registry.registered("potential")["again"] is Again
    for wrong in (Again(2), nn.Linear, ff.fields.Field, "Again"):
        with pytest.raises(TypeError, match="@register_potential stands before a class of the kind potential"):
            ff.register_potential("wrong")(wrong)
    with pytest.raises(TypeError, match="does not support item assignment"):
        registry.registered("potential")["more"] = Again

    class Named(ff.potentials.Potential):
        def __init__(self, name: str) -> None:
            super().__init__(2)

    with pytest.raises(ValueError, match="Named is made with a 'name'"):
        ff.register_potential("named")(Named)


@pytest.mark.parametrize(
    "type_name",
    ["os.system", "potentials.from_module", "potentials.torch", "registry.register", "potential:os", "a:b:c", ""],
)
def test_a_file_makes_nothing_but_parts(tmp_path: Path, type_name: str) -> None:
    model = ff.models.build_vae(**SIZES).save_pretrained(tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["parts"]["encoder"] = {"type": type_name, "arguments": {}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names the (part|\w+) '.*'|model file"):
        ff.models.load_pretrained(model)


def test_weights_of_another_depth_are_not_taken_for_a_registered_part(tmp_path: Path) -> None:
    @ff.register_potential("deep")
    class Deep(ff.potentials.Potential):
        def __init__(self, dim: int, num_flows: int = 1, width: int = 3) -> None:
            super().__init__(dim, num_flows)
            self.weight = nn.Parameter(torch.zeros(width, dim))

        def flow_potential(self, z, t, k):
            return (z @ self.weight.mT).square().sum(-1)

    model = ff.models.build_vae(**SIZES, field="gradient", potential="deep")
    path = model.save_pretrained(tmp_path) / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("potential.weight"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "digest"}))
    save_file(state | {name: torch.zeros(4, 4)}, path)
    with pytest.raises(ValueError, match=r"does not fit the model of its config"):
        ff.models.load_pretrained(tmp_path)
