"""Known densities, and what is measured against them: each measure notices a density that is broken."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints

import flowfactor as ff

KNOWN: dict[str, Callable[[torch.Generator | None], ff.data.KnownDensity]] = {
    "moons": lambda g: ff.data.TwoMoons(generator=g),
    "eight": lambda g: ff.data.EightGaussians(generator=g),
    "banana": lambda g: ff.data.Banana(generator=g),
}


def normal(dim: int = 2, scale: float = 1.0) -> Independent:
    return Independent(Normal(torch.zeros(dim), scale * torch.ones(dim)), 1)


class Shifted(Distribution):
    """Another distribution's log-density with a constant added: no density."""

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {}

    def __init__(self, of: Distribution, by: float) -> None:
        super().__init__(event_shape=of.event_shape, validate_args=False)
        self.of, self.by = of, by

    def log_prob(self, value: Tensor) -> Tensor:
        return self.of.log_prob(value) + self.by


@pytest.mark.parametrize("name", KNOWN)
def test_the_entropy_is_the_mean_surprise_of_samples(name: str, generator: torch.Generator) -> None:
    p = KNOWN[name](generator)
    surprise = -p.log_prob(p.sample((20_000,)))
    assert abs(surprise.mean() - p.entropy()) < 4 * surprise.std() / 20_000**0.5


@pytest.mark.parametrize("name", ["moons", "eight"])
def test_known_densities_of_the_plane_integrate_to_one(name: str) -> None:
    mass = ff.metrics.mass_on_grid(KNOWN[name](None), [-5, -5], [5, 5], points=301)
    assert mass.value == pytest.approx(1, abs=1e-4)
    assert mass.spread < 1e-3


def test_a_banana_is_the_change_of_variables_of_a_normal(generator: torch.Generator) -> None:
    p = ff.data.Banana(4, curvature=0.7, scale=0.3)
    y = torch.randn(4, generator=generator, dtype=torch.float64)

    def bend(y: Tensor) -> Tensor:
        return torch.stack([y[0], 0.3 * y[1] + 0.7 * (y[0] ** 2 - 1), y[2], 0.3 * y[3] + 0.7 * (y[2] ** 2 - 1)])

    jacobian = torch.autograd.functional.jacobian(bend, y)
    assert isinstance(jacobian, Tensor)
    expected = normal(4).log_prob(y.float()) - jacobian.det().abs().log()
    assert float(p.log_prob(bend(y))) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("name", KNOWN)
def test_draws_follow_the_generator(name: str) -> None:
    one, two = (KNOWN[name](torch.Generator().manual_seed(3)).sample((4, 5)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, KNOWN[name](torch.Generator().manual_seed(4)).sample((4, 5)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ff.data.Banana(3), "must be even, got 3"),
        (lambda: ff.data.Banana(scale=0.0), "scale must be positive"),
        (lambda: ff.data.TwoMoons(0.0), "sigma must be positive"),
        (lambda: ff.data.PlanarMixture(torch.zeros(3), 1.0), r"shape \[M, 2\], got \[3\]"),
        (lambda: ff.data.TwoMoons().log_prob(torch.zeros(3)), r"points \[\*batch, 2\], got \[3\]"),
        (lambda: ff.metrics.mass_on_grid(normal(), [0, 0], [1, 1], points=6), "points must be odd"),
        (lambda: ff.metrics.mass_on_grid(normal(), [0, 0], [0, 1]), "low below high"),
        (lambda: ff.metrics.mass_on_grid(normal(3), [0, 0], [1, 1]), "of the plane"),
        (lambda: ff.metrics.kl_divergence(normal(), normal(), torch.zeros(1, 2)), "at least two points"),
        (lambda: ff.metrics.kl_divergence(normal(), Shifted(normal(), math.nan), torch.zeros(2, 2)), "NaN, first at"),
        (lambda: ff.metrics.inverse_error(ff.LatentFlow(ff.fields.FreeField(2)), torch.zeros(2), [0, 1]), "two points"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_divergence_is_that_of_two_normals(generator: torch.Generator) -> None:
    x = torch.randn(20_000, 2, generator=generator)
    kl = ff.metrics.kl_divergence(normal(), normal(scale=2.0), x)
    expected = 2 * (math.log(2) + 1 / 8 - 1 / 2)
    assert kl.low < expected < kl.high
    assert kl.high - kl.low < 0.05
    broken = ff.metrics.kl_divergence(normal(), Shifted(normal(scale=2.0), 0.3), x)
    assert broken.high < expected  # a log-density that claims too much


def test_mass_tells_a_density_from_what_is_none() -> None:
    box = [-6.0, -6.0], [6.0, 6.0]
    assert ff.metrics.mass_on_grid(normal(), *box).value == pytest.approx(1, abs=1e-5)
    broken = ff.metrics.mass_on_grid(Shifted(normal(), 0.3), *box)
    assert broken.value == pytest.approx(math.exp(0.3), abs=1e-4)
    assert ff.metrics.mass_on_grid(normal(scale=0.05), *box, points=21).spread > 0.1  # too coarse a grid


def test_the_inverse_error_notices_steps_that_are_too_long(generator: torch.Generator) -> None:
    u = ff.potentials.QuadraticPotential(2, S=torch.eye(2))
    z, t = torch.randn(50, 2, generator=generator), [0.0, 1.0]
    exact, coarse = (ff.LatentFlow(u, s) for s in (ff.Solver(), ff.Solver("euler", step_size=1.0)))
    assert ff.metrics.inverse_error(exact, z, t).value < 1e-4
    wrong = ff.metrics.inverse_error(coarse, z, t)
    # One step there doubles z, and one back takes it to 0.
    assert wrong.value == pytest.approx(float(z.norm(dim=-1).mean()), rel=1e-5)
    assert wrong.low < wrong.value < wrong.high
