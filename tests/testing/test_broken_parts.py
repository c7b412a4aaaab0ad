"""Every check is seen to fail: parts that break one promise each are refused, and told by it."""

from __future__ import annotations

import math
import pickle
import sys
from dataclasses import replace
from typing import Any, ClassVar

import constructors as table
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

import flowfactor as ff
from flowfactor.fields import Field
from flowfactor.potentials import Derivatives, Potential
from flowfactor.priors import Components
from flowfactor.testing import (
    ContractError,
    check_dataset,
    check_decoder,
    check_encoder,
    check_estimator,
    check_field,
    check_model,
    check_objective,
    check_potential,
    check_prior,
)

D, K = 3, 2


class Well(Potential):
    """Sound, and the base of what is not."""

    def __init__(self) -> None:
        super().__init__(D, K)
        self.weight = nn.Parameter(torch.randn(K, D))
        self.register_buffer("offset", torch.tensor(0.3))

    def flow_potential(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return torch.sin((z * self.weight[k]).sum(-1) + self.offset * t) + z.square().sum(-1)


class WrongShape(Well):
    def flow_potential(self, z, t, k):
        return super().flow_potential(z, t, k).unsqueeze(-1)


class FlatBatchesOnly(Well):
    def flow_potential(self, z, t, k):
        return super().flow_potential(z.reshape(-1, D), t.reshape(-1), k)


class MixedBatch(Well):
    def flow_potential(self, z, t, k):
        u = super().flow_potential(z, t, k)
        return u - u.mean() if u.ndim else u


class PlaceInBatch(Well):
    def forward(self, z, t, control=0):
        u = super().forward(z, t, control)
        return u + torch.arange(u.numel()).reshape(u.shape).to(u)

    def derivatives(self, z, t, control=0, laplacian=None, **rest):
        d = super().derivatives(z, t, control, laplacian, **rest)
        return Derivatives(self(z, t, control), d.gradient, d.time, d.laplacian)


class Changed(Well):
    """A potential one of whose derivatives is another's."""

    name = ""

    def derivatives(self, z, t, control=0, laplacian=None, **rest):
        d = super().derivatives(z, t, control, laplacian, **rest)
        found = vars(d)
        return Derivatives(**found | {self.name: None if found[self.name] is None else 1.01 * found[self.name]})


class WrongValue(Changed):
    name = "value"


class WrongGradient(Changed):
    name = "gradient"


class WrongTime(Changed):
    name = "time"


class WrongLaplacian(Changed):
    name = "laplacian"


class WrongEstimate(Well):
    def derivatives(self, z, t, control=0, laplacian=None, **rest):
        d = super().derivatives(z, t, control, laplacian, **rest)
        return Derivatives(d.value, d.gradient, d.time, 2 * d.laplacian) if laplacian == "hutchinson" else d


class IgnoresGenerator(Well):
    def derivatives(self, z, t, control=0, laplacian=None, *, probe=None, generator=None):
        return super().derivatives(z, t, control, laplacian, probe=probe)


class Detached(Well):
    def flow_potential(self, z, t, k):
        return torch.sin((z * self.weight[k].detach()).sum(-1)) + 0 * self.weight.sum() * t + z.square().sum(-1)


class IgnoresControl(Well):
    def flow_potential(self, z, t, k):
        return super().flow_potential(z, t, 0)


class IgnoresWeights(Well):
    def forward(self, z, t, control=0):
        if isinstance(control, Tensor) and control.is_floating_point():
            control = control.argmax(-1)
        return super().forward(z, t, control)

    def derivatives(self, z, t, control=0, laplacian=None, **rest):
        if isinstance(control, Tensor) and control.is_floating_point():
            control = control.argmax(-1)
        return super().derivatives(z, t, control, laplacian, **rest)


class ScheduleStuck(Well):
    def forward(self, z, t, control=0):
        return super().forward(z, t, control.controls[0] if isinstance(control, ff.Schedule) else control)

    def derivatives(self, z, t, control=0, laplacian=None, **rest):
        control = control.controls[0] if isinstance(control, ff.Schedule) else control
        return super().derivatives(z, t, control, laplacian, **rest)


class Stateful(Well):
    def forward(self, z, t, control=0):
        self.offset += 1e-12
        return super().forward(z, t, control)


class Random(Well):
    def flow_potential(self, z, t, k):
        return super().flow_potential(z, t, k) + 0 * torch.rand(()).to(z)


class Noisy(Well):
    def flow_potential(self, z, t, k):
        return super().flow_potential(z, t, k) + torch.rand(()).to(z)


class FloatBuffer(Well):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.eye(D)

    def flow_potential(self, z, t, k):
        return super().flow_potential(z @ self.matrix, t, k)


class PlainTensor(FloatBuffer):
    def flow_potential(self, z, t, k):
        return Well.flow_potential(self, z @ self.matrix.to(z), t, k)


class Rounded(Well):
    def flow_potential(self, z, t, k):
        return super().flow_potential(z.float(), t.float(), k).to(z)


class NotPicklable(Well):
    def __init__(self) -> None:
        super().__init__()
        self.scale = lambda z: z

    def flow_potential(self, z, t, k):
        return super().flow_potential(self.scale(z), t, k)


class SharedCopies(Well):
    def __deepcopy__(self, memo):
        other = type(self)()
        other.double() if self.weight.dtype == torch.float64 else None
        other.weight, other.offset = self.weight, self.offset
        return other


class HiddenState(Well):
    def __init__(self) -> None:
        super().__init__()
        self._buffers["offset"] = None
        self.register_buffer("offset", torch.tensor(0.3), persistent=False)

    def load_state_dict(self, state, *rest, **options):
        self.offset += 1
        return super().load_state_dict(state, *rest, **options)


class TakesAnything(Well):
    def forward(self, z, t, control=0):
        return super().forward(torch.as_tensor(z).to(self.weight) if isinstance(z, list) else z, t, control)


class NaN(Well):
    def flow_potential(self, z, t, k):
        return super().flow_potential(z, t, k) + torch.log(z[..., 0])


POTENTIALS = {
    WrongShape: r"an int and batch \[\], in torch.float32: expected no error, found ValueError: .*squeeze",
    FlatBatchesOnly: r"batch \[\], in torch.float32: expected no error, found ValueError",
    MixedBatch: "each sample as by itself|leading dimensions|as its one-hot weights",
    PlaceInBatch: "the value: (an index acts|each sample|a permuted batch)",
    WrongValue: "value and derivatives.. agree",
    WrongGradient: "the gradient is that of the value",
    WrongTime: "the time derivative is that of the value",
    WrongLaplacian: "the Laplacian is the divergence of the gradient",
    WrongEstimate: "Hutchinson's estimate has the Laplacian as its mean",
    IgnoresGenerator: "equal generators draw equal probes",
    Detached: r"gradients of parameters are those of finite differences \(weight\): expected",
    IgnoresControl: "the control says which flow acts: expected another, found flow 1 equal to flow 0",
    IgnoresWeights: "weights superpose the flows",
    ScheduleStuck: "a schedule acts as its pieces",
    Stateful: "an evaluation leaves offset as it was",
    Random: "all draws are the generator's",
    Noisy: "leading dimensions|the same evaluation gives the same again",
    FloatBuffer: r"in torch.float64: expected no error, found RuntimeError: .*dtype",
    PlainTensor: "tensors are parameters or buffers.*found plain tensors matrix",
    Rounded: r"each sample as by itself|is that of the value|gradients of parameters",
    NotPicklable: "what pickle gives back gives the same, as worker processes need it: expected no error, found",
    SharedCopies: "a copy by copy.deepcopy .* shares no memory",
    HiddenState: "the state_dict holds all that the outputs depend on",
    TakesAnything: "a list in place of a state is refused: expected ValueError or TypeError",
    NaN: "finite: expected finite numbers, found NaN or infinity",
}


@pytest.mark.parametrize("cls", POTENTIALS, ids=lambda cls: cls.__name__)
def test_potentials_that_break_a_promise_are_refused_by_it(cls: type[Potential]) -> None:
    with pytest.raises(ContractError, match=POTENTIALS[cls]) as error:
        check_potential(cls())
    assert str(error.value).startswith(f"{cls.__name__}: ")


def test_sound_parts_pass_and_stay_as_they_were() -> None:
    u = Well()
    state, seed = {name: value.clone() for name, value in u.state_dict().items()}, torch.get_rng_state()
    assert check_potential(u) is None
    assert check_field(ff.fields.GradientField(u)) is None
    assert all(torch.equal(value, state[name]) for name, value in u.state_dict().items())
    assert torch.equal(seed, torch.get_rng_state())
    assert u.weight.grad is None


@pytest.mark.parametrize(("cls", "promise"), [(NotPicklable, "pickle"), (IgnoresControl, "flows"),
                                              (PlainTensor, "registered")])  # fmt: skip
def test_a_part_can_be_excused_from_a_promise(cls: type[Potential], promise: str) -> None:
    check_potential(cls(), without=[promise])
    check_potential(cls(), without=promise)


def test_wrong_arguments_of_checks_are_named() -> None:
    with pytest.raises(ValueError, match="without names pickles; a part can be excused from deepcopy, pickle"):
        check_potential(Well(), without=["pickles"])
    for check, wanted in ((check_potential, "Potential"), (check_field, "Field"), (check_prior, "Prior"),
                          (check_objective, "Objective"), (check_estimator, "FactorEstimator"),
                          (check_dataset, "SequenceDataset")):  # fmt: skip
        with pytest.raises(TypeError, match=f"{wanted}.*, got Linear"):
            check(nn.Linear(2, 2))
    for check in (check_encoder, check_decoder, check_model):
        with pytest.raises(TypeError, match=r"give (shape|latent_dim|image_shape)="):
            check(nn.Linear(2, 2))


def test_the_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ContractError("Well", "values are numbers", "NaN", "numbers")))
    assert (error.part, error.promise, error.found, error.expected) == ("Well", "values are numbers", "NaN", "numbers")
    assert isinstance(error, AssertionError) and str(error) == "Well: values are numbers: expected numbers, found NaN"


class Spin(Field):
    def __init__(self) -> None:
        super().__init__(D, K)
        self.matrix = nn.Parameter(torch.randn(K, D, D))

    def flow_velocity(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        return torch.tanh(z @ self.matrix[k]) * torch.cos(t).unsqueeze(-1)


class ShortVelocity(Spin):
    def flow_velocity(self, z, t, k):
        return super().flow_velocity(z, t, k)[..., :-1]


class WrongDivergence(Spin):
    def divergence(self, z, t, control=0, kind="exact", probe=None):
        return 1.001 * super().divergence(z, t, control, kind, probe)


class WrongProbe(Spin):
    def divergence(self, z, t, control=0, kind="exact", probe=None):
        return super().divergence(z, t, control, kind, None if probe is None else probe.abs())


class CallsItselfDivergenceFree(Spin):
    def divergence(self, z, t, control=0, kind="exact", probe=None):
        super().divergence(z, t, control, kind, probe)
        return torch.zeros_like(z[..., 0])


class NoProbeNeeded(Spin):
    def divergence(self, z, t, control=0, kind="exact", probe=None):
        return super().divergence(z, t, control, "exact" if probe is None and kind != "trace" else kind, probe)


FIELDS = {
    ShortVelocity: "expected no error, found ValueError: a field must return a velocity of the state's shape",
    WrongDivergence: "the divergence is the trace of the Jacobian",
    WrongProbe: "Hutchinson's estimate has the divergence as its mean",
    CallsItselfDivergenceFree: "the divergence is the trace of the Jacobian",
    NoProbeNeeded: "Hutchinson's estimate without a probe is refused: expected ValueError or TypeError, found tensor",
}


@pytest.mark.parametrize("cls", FIELDS, ids=lambda cls: cls.__name__)
def test_fields_that_break_a_promise_are_refused_by_it(cls: type[Field]) -> None:
    with pytest.raises(ContractError, match=FIELDS[cls]):
        check_field(cls())


class Shifted(ff.priors.GaussianPrior):
    """Sound, and the base of what is not."""

    def __init__(self) -> None:
        super().__init__(2)
        self.mean = nn.Parameter(torch.tensor([[0.5, -1.0], [2.0, 0.0]]))

    def components(self) -> Components:
        return Components(self.mean.new_zeros(2), self.mean, torch.ones_like(self.mean) / 4)


class Wrapped(Distribution):
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Distribution, add: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)
        self.base, self.add, self.scale = base, add, scale

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.scale * self.base.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value) + self.add


class Unnormalised(Shifted):
    def at(self, t, control=0):
        return Wrapped(super().at(t, control), add=0.1)


class OtherDraws(Shifted):
    def at(self, t, control=0):
        return Wrapped(super().at(t, control), scale=1.1)


class NoBatch(Shifted):
    def at(self, t, control=0):
        return Independent(super().at(t, control).expand([1]), 1)


class DetachedPrior(Shifted):
    def components(self):
        c = super().components()
        return Components(c.log_weights, c.means.detach() + 0 * c.means, c.variances)


PRIORS = {
    Unnormalised: "exp.log_prob. integrates to 1",
    OtherDraws: "moment 1 by log_prob is that of draws",
    NoBatch: r"at\(\) with an int and batch \[\], .*expected a Distribution with event \[2\]",
    DetachedPrior: r"gradients of parameters are those of finite differences \(mean\)",
}


@pytest.mark.parametrize("cls", PRIORS, ids=lambda cls: cls.__name__)
def test_priors_that_break_a_promise_are_refused_by_it(cls: type[ff.priors.Prior]) -> None:
    check_prior(Shifted())
    with pytest.raises(ContractError, match=PRIORS[cls]):
        check_prior(cls())


class WrongDivergenceOfSpikes(ff.priors.SpikeAndSlab):
    def kl(self, q):
        return super().kl(q) + 0.3


def test_a_sparse_prior_whose_divergence_is_not_that_of_its_densities_is_refused() -> None:
    with pytest.raises(ContractError, match="kl is the mean of the log ratio at draws"):
        check_prior(WrongDivergenceOfSpikes(K, learned=True))


class Encoder(nn.Module):
    """Sound, and the base of what is not."""

    latent_dim, event_shape = 3, (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 6)

    def raw(self, x: Tensor) -> Tensor:
        if x.shape[-3:] != self.event_shape or not x.is_floating_point():
            raise ValueError("frames")
        return self.layer(x.flatten(-3))

    def forward(self, x: Tensor) -> Distribution:
        mean, std = self.raw(x).chunk(2, -1)
        return Independent(Normal(mean, std.exp()), 1)


class EventOfOne(Encoder):
    def forward(self, x):
        return super().forward(x).base_dist


class OneBatchDimension(Encoder):
    def raw(self, x):
        return super().raw(x.reshape(-1, *self.event_shape))


class Normalised(Encoder):
    def raw(self, x):
        y = super().raw(x)
        return y - y.mean() if y.ndim > 1 else y


class FullOfBytes(Encoder):
    def raw(self, x):
        return super().raw(x.to(self.layer.weight))


class AnyShape(Encoder):
    def raw(self, x):
        return self.layer(x[..., :4].flatten(-3)) if x.is_floating_point() else super().raw(x)


ENCODERS = {
    EventOfOne: "the encoder gives a distribution of the batch",
    OneBatchDimension: "the encoder gives a distribution of the batch",
    Normalised: "each sample as by itself",
    FullOfBytes: "frames of whole numbers is refused",
    AnyShape: "frames of another shape is refused",
}


@pytest.mark.parametrize("cls", ENCODERS, ids=lambda cls: cls.__name__)
def test_encoders_that_break_a_promise_are_refused_by_it(cls: type[nn.Module]) -> None:
    check_encoder(Encoder())
    with pytest.raises(ContractError, match=ENCODERS[cls]):
        check_encoder(cls())


class NoLogProb(ff.encoders.MLPDecoder):
    def forward(self, z):
        return Independent(super().forward(z), 0)  # sound so far

    def mean(self, z):
        return super().mean(z).flatten(-3)


class OtherEvent(ff.encoders.MLPDecoder):
    def forward(self, z):
        return super().forward(z).base_dist


@pytest.mark.parametrize(
    ("cls", "match"), [(NoLogProb, "the mean frame: expected a tensor"), (OtherEvent, "distribution of the batch")]
)
def test_decoders_that_break_a_promise_are_refused_by_it(cls: type[nn.Module], match: str) -> None:
    with pytest.raises(ContractError, match=match):
        check_decoder(cls(3, (1, 4, 4), hidden=(4,)))


class SumOfAll(ff.objectives.MarginalBound):
    def divergence(self, start, prior, path, t, control):
        return super().divergence(start, prior, path, t, control).sum()


class OtherPath(ff.objectives.MarginalBound):
    def divergence(self, start, prior, path, t, control):
        return super().divergence(start, prior, path, t, control).roll(1)


class OtherWeights(ff.objectives.MarginalBound):
    def log_weights(self, log_p, q, prior, path, t, control):
        return super().log_weights(log_p, q, prior, path, t, control) + 0.5


class CutGradient(ff.objectives.PathBound):
    def begin(self, q, prior, z0, control):
        return super().begin(q, prior, z0, control).detach() + 0 * z0.sum(-1)


class NotJSON(ff.objectives.PathBound):
    def __init__(self, scale=torch.float32):
        self.scale = lambda x: x


OBJECTIVES = {
    SumOfAll: r"divergence gives a number of each path: expected a tensor \[4\]",
    OtherPath: r"each path as by itself \(an int\)",
    OtherWeights: "E ln w is E ln p.x.z. less the divergence: expected .* found a gap of",
    CutGradient: "the gradient is that of the value",
    NotJSON: "what pickle gives back|a copy by copy.deepcopy",
}


@pytest.mark.parametrize("cls", OBJECTIVES, ids=lambda cls: cls.__name__)
def test_objectives_that_break_a_promise_are_refused_by_it(cls: type[ff.objectives.Objective]) -> None:
    with pytest.raises(ContractError, match=OBJECTIVES[cls]):
        check_objective(cls())


class Average(ff.models.FactorEstimator):
    def expectation(self, batch):
        terms = batch.expected(batch.log_q)
        return replace(terms, loss=terms.loss.mean())


class DeafToGenerators(ff.models.GumbelEstimator):
    def expectation(self, batch):
        return super().expectation(replace(batch, generator=None))


class TeachesNothing(ff.models.FactorEstimator):
    def expectation(self, batch):
        log_q = batch.log_q.detach()
        return batch.expected(log_q)


class NeverCounts(ff.models.EnumerateEstimator):
    def advance(self):
        pass


ESTIMATORS = {
    Average: r"loss of each sequence: expected a tensor \[6\]",
    DeafToGenerators: "equal generators give equal losses|all draws are the generator's",
    TeachesNothing: r"the loss has a gradient for q\(k\|x\), early",
    NeverCounts: "advance counts a step: expected 1, found 0",
}


@pytest.mark.parametrize("cls", ESTIMATORS, ids=lambda cls: cls.__name__)
def test_estimators_that_break_a_promise_are_refused_by_it(cls: type[ff.models.FactorEstimator]) -> None:
    with pytest.raises(ContractError, match=ESTIMATORS[cls]):
        check_estimator(cls())


class Model(ff.models.VAE):
    """Sound, and the base of what is not."""


class Forgetful(Model):
    def forward(self, frames, t, k=None, *, generator=None):
        return super().forward(frames, t, k)


class NoGradient(Model):
    def forward(self, frames, t, k=None, *, generator=None):
        with torch.no_grad():
            return super().forward(frames, t, k, generator=generator)


class FlatTransform(Model):
    def transform(self, x0, t, control=0):
        return super().transform(x0, t, control).flatten(0, 1)


class BatchTransform(Model):
    def transform(self, x0, t, control=0):
        return super().transform(x0, t, control) / len(x0)


class CountsEvaluations(Model):
    def __init__(self, *parts, **settings) -> None:
        super().__init__(*parts, **settings)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, frames, t, k=None, *, generator=None):
        self.count += 1
        return super().forward(frames, t, k, generator=generator)


class LosesItsWeights(Model):
    @classmethod
    def from_pretrained(cls, directory, **parts):
        return changed_model(super().from_pretrained(directory, **parts))


class TakesHoles(Model):
    def forward(self, frames, t, k=None, *, generator=None):
        return super().forward(frames.nan_to_num(), t, k, generator=generator)


def changed_model(model: Any) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    return model


MODELS = {
    Forgetful: "equal generators give equal losses|all draws are the generator's",
    NoGradient: "the loss carries gradients",
    FlatTransform: r"transformed images \(an int\): expected a tensor \[4, 3, 1, 8, 8\]",
    BatchTransform: r"each image is transformed by itself \(an int\)",
    CountsEvaluations: "evaluation leaves count as it was",
    LosesItsWeights: "a model that was saved and loaded gives the same",
    TakesHoles: "frames that are not finite is refused",
}


def model(cls: type[nn.Module]) -> nn.Module:
    made = ff.models.build_model("vae", (1, 8, 8), 2, 4, **table.SMALL)
    return cls(made.encoder, made.decoder, 2)


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_models_that_break_a_promise_are_refused_by_it(cls: type[nn.Module]) -> None:
    check_model(model(ff.models.VAE))
    with pytest.raises(ContractError, match=MODELS[cls]):
        check_model(model(cls))


class Pictures(ff.data.TransformedImages):
    """Sound, and the base of what is not."""

    def __init__(self) -> None:
        flows = {"turn": (ff.data.Rotate(), 0, 80), "grow": (ff.data.Scale(), 1, 1.8)}
        super().__init__(torch.rand(9, 1, 6, 6), flows, steps=3)


class OutOfRange(Pictures):
    def _frames(self, indices, k):
        made = super()._frames(indices, k)
        return made | {"frames": 2 * made["frames"] - 1}


class DoublePrecision(Pictures):
    def _frames(self, indices, k):
        made = super()._frames(indices, k)
        return made | {"frames": made["frames"].double()}


class NewNoise(Pictures):
    def _frames(self, indices, k):
        made = super()._frames(indices, k)
        return made | {"frames": (made["frames"] + 0.01 * torch.rand(())).clamp(0, 1)}


class OrderMatters(Pictures):
    def _frames(self, indices, k):
        made = super()._frames(indices, k)
        return made | {"frames": made["frames"] * torch.linspace(1, 0.5, len(indices)).reshape(-1, 1, 1, 1, 1)}


class LongEpoch(Pictures):
    def plan(self, batch_size, **settings):
        return 2 * super().plan(batch_size, **settings)


class GlobalDraws(Pictures):
    def plan(self, batch_size, *, generator=None, **settings):
        torch.rand(())
        return super().plan(batch_size, generator=generator, **settings)


class OtherEpochs(Pictures):
    def plan(self, batch_size, *, generator=None, **settings):
        return super().plan(
            batch_size, generator=torch.Generator().manual_seed(int(torch.randint(999, ()))), **settings
        )


class Unbalanced(Pictures):
    def plan(self, batch_size, *, stratified=True, **settings):
        return [(indices, 0 * k) for indices, k in super().plan(batch_size, **settings)]


class NeverEnds(Pictures):
    def __getitem__(self, index):
        return super().__getitem__(index % len(self))


class NamelessFlow(Pictures):
    @property
    def num_flows(self):
        return 3


class StandStill(Pictures):
    def __init__(self) -> None:
        super().__init__()
        self.t = torch.zeros(4)


class HeldOpen(Pictures):
    def __init__(self) -> None:
        super().__init__()
        self.file = (i for i in range(3))


class SubsetOfOthers(Pictures):
    def _select(self, indices):
        super()._select(indices.flip(0))


DATASETS = {
    OutOfRange: r"frames lie in \[0, 1\]: expected \[0, 1\], found values from -",
    DoublePrecision: "frames: expected a tensor .* of torch.float32 on cpu, found .* of torch.float64",
    NewNoise: r"a batch in another order \(frames\)",
    OrderMatters: r"a batch in another order \(frames\)",
    LongEpoch: "an epoch has an element at most once",
    GlobalDraws: "all draws are the generator's: expected none",
    OtherEpochs: "equal generators draw equal epochs",
    Unbalanced: "a stratified batch has as many of each k",
    NeverEnds: r"d\[len\(d\)\] is refused: expected IndexError, found dict",
    NamelessFlow: "every flow has a name",
    StandStill: r"times are \[T\+1\] and increase",
    HeldOpen: "a copy by copy.deepcopy .*expected no error, found TypeError: cannot pickle",
    SubsetOfOthers: "a subset holds its elements",
}


@pytest.mark.parametrize("cls", DATASETS, ids=lambda cls: cls.__name__)
def test_data_sets_that_break_a_promise_are_refused_by_it(cls: type[ff.data.SequenceDataset]) -> None:
    check_dataset(Pictures())
    with pytest.raises(ContractError, match=DATASETS[cls]):
        check_dataset(cls())


def test_hadamard_probes_have_the_identity_as_their_mean() -> None:
    from flowfactor.testing.flows import _probes

    for dim in (1, 2, 3, 5, 8, 48):
        probes = _probes(dim, torch.zeros(()).double())
        assert probes.abs().eq(1).all() and len(probes) == 2 ** math.ceil(math.log2(dim))
        torch.testing.assert_close(probes.mT @ probes / len(probes), torch.eye(dim).double())


def test_a_check_of_saved_files_is_not_left_out_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"flowfactor\[io\]"):
        check_model(model(ff.models.VAE))
    check_model(model(ff.models.VAE), without=["state_dict"])
