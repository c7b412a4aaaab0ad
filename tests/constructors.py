"""One table of constructors for each kind of part: what every contract test runs over.

`PARTS` names the public classes of each package that an entry has to be for; `tests/testing/test_table.py` fails where one
is missing. ``FLOWFACTOR_TEST_DTYPE`` (float32, float64) and ``FLOWFACTOR_TEST_DEVICE`` (cpu, cuda, ...) say in what
precision and where the parts are made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import published_files
import pytest
import torch
from small_runs import write_mnist
from torch import Tensor, nn

import flowfactor as ff

D, K, STEPS, SHAPE = 4, 3, 4, (1, 8, 8)
E, F, P, Q = ff.encoders, ff.fields, ff.potentials, ff.priors


def setting(name: str, known: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Any:
    """What an environment variable chooses; the first of what is known where it is not set."""
    chosen = environment.get(name, next(iter(known)))
    if chosen not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {chosen!r}")
    return known[chosen]


def devices() -> dict[str, torch.device]:
    """The devices that there are, by name."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    names = ["cpu", *(["cuda"] if cuda else []), *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]
    return {name: torch.device(name) for name in names}


DTYPE: torch.dtype = setting("FLOWFACTOR_TEST_DTYPE", {"float32": torch.float32, "float64": torch.float64})
DEVICE: torch.device = setting("FLOWFACTOR_TEST_DEVICE", devices())


def build(table: Mapping[str, Callable[[], Any]], name: str) -> Any:
    """Makes a part in the precision and on the device that the tests run in, its parameters moved off their start."""
    part = table[name]()
    if not isinstance(part, nn.Module):
        return part  # an objective: it has no numbers of its own
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return part.to(DEVICE, DTYPE)


class UserPotential(P.Potential):
    def __init__(self) -> None:
        super().__init__(D, K)
        self.direction = nn.Parameter(torch.randn(K, D))
        self.rate = nn.Parameter(torch.ones(()))

    def flow_potential(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        assert t.shape == z.shape[:-1]
        return torch.sin(z @ self.direction[k] + self.rate * t)


class UserField(F.Field):
    def __init__(self) -> None:
        super().__init__(D, K)
        self.matrix = nn.Parameter(torch.randn(K, D, D))

    def flow_velocity(self, z: Tensor, t: Tensor, k: int) -> Tensor:
        assert t.shape == z.shape[:-1]
        return torch.tanh(z @ self.matrix[k]) * torch.cos(t).unsqueeze(-1)


class LayeredPotential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.net(z).squeeze(-1) * torch.cos(t)


class LayeredField(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, D))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.net(z) + t.unsqueeze(-1)


def mlp() -> P.MLPPotential:
    return P.MLPPotential(D, K, (6, 5), rank=2, time_features=4, init_scale=1.0)


POTENTIALS: dict[str, Callable[[], P.Potential]] = {
    "mlp": lambda: P.MLPPotential(D, K, (6, 5)),
    "convex": lambda: P.ConvexPotential(D, K, (6, 5)),
    "paper": lambda: P.PaperPotential(D, K),
    "resnet": lambda: P.ResNetPotential(D, K, width=6, depth=2),
    "quadratic": lambda: P.QuadraticPotential(D, K),
    "displacement": lambda: P.DisplacementPotential(D, K, rest=1, hidden=6, scale=0.5),
    "mlp-timeless": lambda: P.MLPPotential(D, K, (6, 5), time_features=0),
    "convex-timeless": lambda: P.ConvexPotential(D, K, (6, 5), time_features=0),
    "paper-timeless": lambda: P.PaperPotential(D, K, time_features=0),
    "resnet-timeless": lambda: P.ResNetPotential(D, K, width=6, depth=2, time_features=0),
    "displacement-timeless": lambda: P.DisplacementPotential(D, K, rest=1, hidden=6, scale=0.5, time_features=0),
    "stationary": lambda: P.Stationary(P.MLPPotential(D, K, (6, 5), time_features=0), [0.1, 0.5, 2.0]),
    "user": UserPotential,
    "module": lambda: P.from_module([LayeredPotential() for _ in range(K)], D),
}

FIELDS: dict[str, Callable[[], F.Field]] = {
    "gradient": lambda: F.GradientField(mlp()),
    "skew-learned": lambda: F.SkewGradientField(mlp()),
    "skew-canonical": lambda: F.SkewGradientField(mlp(), "canonical"),
    "skew-given": lambda: F.SkewGradientField(mlp(), torch.randn(K, D, D)),
    "skew-quadratic": lambda: F.SkewGradientField(P.QuadraticPotential(D, K)),
    "helmholtz": lambda: F.HelmholtzField(mlp(), mlp()),
    "helmholtz-two": lambda: F.HelmholtzField(mlp(), P.ResNetPotential(D, K, width=6), mlp(), skew="canonical"),
    "solenoidal": lambda: F.SolenoidalField(D, K, 6, rank=2, time_features=4, init_scale=1.0),
    "solenoidal-rank-0": lambda: F.SolenoidalField(D, K, 6, rank=0, time_features=4),
    "helmholtz-ridges": lambda: F.HelmholtzField(mlp(), F.SolenoidalField(D, K, 6, time_features=4), mlp()),
    "helmholtz-turning": lambda: F.HelmholtzField(mlp(), F.SolenoidalField(D, K, 6, time_features=4), turning=[0, 2]),
    "helmholtz-turning-skew": lambda: F.HelmholtzField(mlp(), mlp(), turning=[1]),
    "free": lambda: F.FreeField(D, K, (6, 5), rank=2, time_features=4, init_scale=1.0),
    "free-rank-0": lambda: F.FreeField(D, K, (6, 5), rank=0, time_features=4),
    "helmholtz-stationary": lambda: F.HelmholtzField(
        P.Stationary(P.MLPPotential(D, K, (6, 5), rank=2, time_features=0, init_scale=1.0)),
        P.MLPPotential(D, K, (6, 5), rank=2, time_features=0),
    ),
    "gradient-timeless": lambda: F.GradientField(P.MLPPotential(D, K, (6, 5), rank=2, time_features=0, init_scale=1.0)),
    "helmholtz-timeless": lambda: F.HelmholtzField(
        P.MLPPotential(D, K, (6, 5), rank=2, time_features=0), F.SolenoidalField(D, K, 6, rank=2, time_features=0)
    ),
    "free-timeless": lambda: F.FreeField(D, K, (6, 5), rank=2, time_features=0, init_scale=1.0),
    "user": UserField,
    "module": lambda: F.from_module([LayeredField() for _ in range(K)], D),
}


def _vamp() -> Q.VampPrior:
    return Q.VampPrior(E.MLPEncoder(SHAPE, D, hidden=(8,)), count=5, shape=SHAPE)


PRIORS: dict[str, Callable[[], Any]] = {
    "standard": lambda: Q.StandardNormal(2),
    "mixture": lambda: Q.GaussianMixture(2, components=3),
    "vamp": _vamp,
    "diffusion": lambda: Q.Diffusion(Q.StandardNormal(2), K, init=(0.5, 1.0, 2.0)),
    "diffusion-mixture": lambda: Q.Diffusion(Q.GaussianMixture(D, components=3), K),
    "augmented": lambda: Q.Augmented(Q.StandardNormal(2), 1, 0.5),
    "augmented-mixture": lambda: Q.Augmented(Q.GaussianMixture(1, components=3), 1, 0.5),
    "augmented-diffusion": lambda: Q.Diffusion(Q.Augmented(Q.StandardNormal(1), 1, 0.5), K, init=(0.5, 1.0, 2.0)),
    "sparse": lambda: Q.SpikeAndSlab(K, learned=True),
    "sparse-laplace": lambda: Q.SpikeAndSlab(K, slab="laplace", learned=True),
}

ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: E.MLPEncoder(SHAPE, D, hidden=(8,)),
    "conv": lambda: E.ConvEncoder(D, 1, 8, widths=(8,), hidden=(8,)),
    "conv-colour": lambda: E.ConvEncoder(D, 3, (8, 12), widths=(8, 8), strides=(1, 2), kernel_size=3, residual=1),
    "conv-paper": lambda: E.ConvEncoder.paper(D, 1, 8, width=2),
    "augmented": lambda: E.AugmentedEncoder(E.MLPEncoder(SHAPE, D, hidden=(8,)), 2),
    "factor": lambda: E.FactorEncoder(K, STEPS + 1, 1, 8, widths=(8,), hidden=(8,)),
    "factor-three-frames": lambda: E.FactorEncoder(K, STEPS + 1, 1, 8, widths=(8,), kernel_size=3, frames_seen=3),
    "pair": lambda: E.PairEncoder(K, 1, 8, widths=(8,), hidden=(8,)),
    "pair-laplace": lambda: E.PairEncoder(K, 1, 8, widths=(8,), controls=2, slab="laplace"),
}
ENCODER_SHAPES = {"pair": (STEPS + 1, *SHAPE), "pair-laplace": (STEPS + 1, *SHAPE)}
"""Shapes of one input, where the encoder's event_shape is another."""

DECODERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: E.MLPDecoder(D, SHAPE, hidden=(8,)),
    "mlp-gaussian": lambda: E.MLPDecoder(D, SHAPE, hidden=(8,), likelihood="gaussian"),
    "mlp-unbounded": lambda: E.MLPDecoder(D, SHAPE, hidden=(8,), likelihood=E.Gaussian(bounded=False)),
    "conv": lambda: E.ConvDecoder(D, 1, 8, widths=(8,), hidden=(8,)),
    "conv-transpose": lambda: E.ConvDecoder(
        D, 3, 8, widths=(8, 8), strides=(1, 2), kernel_size=3, upsample="transpose"
    ),
    "conv-paper": lambda: E.ConvDecoder.paper(D, 1, 8, width=2),
}

OBJECTIVES: dict[str, Callable[[], ff.objectives.Objective]] = {
    "path": ff.objectives.PathBound,
    "marginal": ff.objectives.MarginalBound,
}

ESTIMATORS: dict[str, Callable[[], ff.models.FactorEstimator]] = {
    "balanced": lambda: ff.models.BalancedEstimator(tau=3.0),
    "gumbel": ff.models.GumbelEstimator,
    "enumerate": ff.models.EnumerateEstimator,
}

SMALL: dict[str, Any] = {"encoder": {"widths": [8]}, "decoder": {"widths": [8]}}


def _method(name: str, **settings: Any) -> Callable[[], Any]:
    dim = 6 if name == "topographic-vae" else D  # two capsules
    return lambda: ff.models.build_model(name, SHAPE, 2, dim, num_frames=STEPS + 1, **SMALL, **settings)


MODELS: dict[str, Callable[[], Any]] = {
    **{name: _method(name) for name in ff.models.METHODS},
    "ours-marginal": _method("ours", objective="marginal"),
    "ours-weak-gumbel": _method("ours-weak", estimator="gumbel"),
    "ours-weak-enumerate": _method("ours-weak", estimator="enumerate"),
    "ours-steered": _method("ours", context={"pose": 2, "speed": 1}),
    "ours-augmented": _method("ours", field="gradient", augment_dim=3),
    "ours-augmented-marginal": _method("ours", objective="marginal", prior="diffusion-mixture", augment_dim=3),
    "sta-augmented": _method("sta", augment_dim=3),
    "sta-steered": _method("sta", context=2),
}

FLOWS = {
    "grow": (ff.data.Scale(), 1.0, 1.8),
    "turn": (ff.data.Rotate(), 0.0, 80.0),
    "paint": (ff.data.Hue(), 0.0, 160.0),
}
SCENES: dict[str, Any] = {"size": 8, "supersampling": 1, "steps": 3, "hues": 4, "scales": 4, "orientations": 4}


def _images(count: int = 30, shape: tuple[int, ...] = (10, 12)) -> Tensor:
    return torch.randint(256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _digits(folder: Path) -> ff.data.Digits:
    pytest.importorskip("sklearn")
    return ff.data.Digits("test", steps=3)


def _shapes(folder: Path) -> ff.data.Shapes3D:
    pytest.importorskip("h5py")
    path = published_files.write_shapes(folder / "3dshapes.h5", *published_files.shapes_arrays())
    return ff.data.Shapes3D(path, vary=("floor_hue", "scale"), steps=2)


def _rendered(name: str, **settings: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        pytest.importorskip("PIL")
        cls, _, _, inner = published_files.RENDERED[name]
        published_files.write_rendered(folder / inner, name)
        return cls(folder, "all", steps=1, **settings)

    return make


def _irregular(folder: Path) -> ff.data.Sequences:
    films = [film[: 3 + n % 3] for n, film in enumerate(_images(9, (5, 5, 7)))]
    t = [[s * (1 + n / 4) for s in range(len(film))] for n, film in enumerate(films)]
    context = {"pose": [[n / 9, 1.0] for n in range(9)], "speed": [[1 + n / 4] for n in range(9)]}
    return ff.data.Sequences(films, [n % 3 for n in range(9)], t, pad=True, context=context)


DATASETS: dict[str, Callable[[Path], ff.data.SequenceDataset]] = {
    "images": lambda folder: ff.data.TransformedImages(_images(), FLOWS, steps=3, colour="red"),
    "images-any": lambda folder: ff.data.TransformedImages(
        _images(), FLOWS, steps=3, colour="red", start="any", direction="both"
    ),
    "images-backward": lambda folder: ff.data.TransformedImages(
        _images(), FLOWS, steps=3, colour="red", direction="backward"
    ),
    "sequences": lambda folder: ff.data.Sequences(_images(9, (4, 5, 7))),
    "sequences-labelled": lambda folder: ff.data.Sequences(_images(9, (4, 5, 7)), torch.arange(9) % 3),
    "sequences-irregular": _irregular,
    "scenes": lambda folder: ff.data.Scenes("test", **SCENES),
    "scenes-both": lambda folder: ff.data.Scenes("test", direction="both", **SCENES),
    "combined-images": lambda folder: ff.data.CombinedImages(_images(), FLOWS, steps=3, colour="red"),
    "combined-images-any": lambda folder: ff.data.CombinedImages(
        _images(), FLOWS, steps=3, colour="red", start="any", direction="both"
    ),
    "combined-scenes": lambda folder: ff.data.CombinedScenes(ff.data.Scenes("test", **SCENES), 12),
    "mnist": lambda folder: ff.data.MNIST(write_mnist(folder), "test", steps=3),
    "digits": _digits,
    "shapes3d": _shapes,
    "dsprites": lambda folder: ff.data.DSprites(published_files.write_sprites(folder / "d.npz"), steps=2),
    "falcor3d": _rendered("falcor"),
    "isaac3d": _rendered("isaac", vary=("robot_x", "robot_y")),
    "norb": lambda folder: ff.data.SmallNORB(published_files.write_norb(folder), "test", steps=2, vary=("azimuth",)),
}
