"""Names that have changed: the old ones work for this release, warn, and load what was saved under them."""

from __future__ import annotations

import importlib
import math
import pickle
from typing import Any

import pytest
import torch

import flowfactor as ff
from flowfactor import training
from flowfactor._config import describe, rebuild
from flowfactor.solver import SOLVER_METHODS
from flowfactor.training.schedule import LearningRateSchedule

RENAMED = [
    ("flowfactor.training", "Schedule", LearningRateSchedule),
    ("flowfactor.training.schedule", "Schedule", LearningRateSchedule),
    ("flowfactor.solver", "METHODS", SOLVER_METHODS),
]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_an_old_name_is_the_new_one_and_warns_of_it_where_it_is_used(module: str, old: str, new: object) -> None:
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is now {module}\.\w+; the old name goes") as told:
        assert getattr(importlib.import_module(module), old) is new
    assert told[0].filename == __file__


def test_an_old_name_is_not_offered_and_other_names_are_missing() -> None:
    assert "Schedule" not in training.__all__
    for module, old, _ in RENAMED:
        assert old not in dir(importlib.import_module(module))
        with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'Nothing'"):
            importlib.import_module(module).Nothing  # noqa: B018


def test_a_pickle_that_holds_the_old_class_loads() -> None:
    schedule = LearningRateSchedule(steps=10, warmup=0.2)
    # Protocol 0 spells out the module and the name, as a release before this one wrote them.
    saved = pickle.dumps(schedule, 0).replace(b"LearningRateSchedule", b"Schedule")
    with pytest.warns(DeprecationWarning, match="is now"):
        assert pickle.loads(saved) == schedule


TIMED = {
    "mlp": ff.potentials.MLPPotential,
    "convex": ff.potentials.ConvexPotential,
    "paper": ff.potentials.PaperPotential,
    "solenoidal": ff.fields.SolenoidalField,
    "free": ff.fields.FreeField,
}


@pytest.mark.parametrize("name", TIMED)
def test_the_time_scale_has_one_name_and_its_former_one_warns(name: str) -> None:
    make = TIMED[name]
    new = make(4, time_scale=5.0)
    with pytest.warns(DeprecationWarning, match="max_period is called time_scale now") as told:
        old = make(4, max_period=5.0)
    assert told[0].filename == __file__
    assert new.features.time_scale == old.features.time_scale == 5.0
    assert describe(new) == describe(old)
    with pytest.raises(ValueError, match="max_period is the former name of time_scale: give one"):
        make(4, max_period=5.0, time_scale=4.0)


def test_parts_saved_under_a_former_name_load_without_a_warning() -> None:
    written = describe(ff.potentials.MLPPotential(4, time_scale=5.0))
    assert written is not None
    written["arguments"]["max_period"] = written["arguments"].pop("time_scale")
    assert rebuild(written).features.time_scale == 5.0


def test_settings_may_have_the_former_name() -> None:
    with pytest.warns(DeprecationWarning, match="time_scale now"):
        model = ff.models.build_vae((1, 8, 8), 2, 4, field="gradient", potential={"name": "mlp", "max_period": 5.0})
    potential: Any = model.flow.field.potential
    assert potential.features.time_scale == 5.0


def test_a_class_of_ones_own_may_mean_something_else_by_a_former_name() -> None:
    class Own(ff.potentials.MLPPotential):
        def __init__(self, dim: int, max_period: float) -> None:
            super().__init__(dim, time_scale=2 * max_period)

    own = Own(3, max_period=5.0)
    assert own.features.time_scale == 10.0
    assert own._arguments == ((3,), {"max_period": 5.0})


def test_the_slowest_feature_is_the_sine_of_time_over_the_time_scale() -> None:
    features = ff.potentials.MLPPotential(2, time_features=6, time_scale=7.0).features
    t = torch.tensor(0.3)
    assert features(t, derivative=False)[0][0, 2].item() == pytest.approx(math.sin(0.3 / 7.0), rel=1e-5)
