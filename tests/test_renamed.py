"""Names that have changed: the old ones work for this release, warn, and load what was saved under them."""

from __future__ import annotations

import importlib
import pickle

import pytest

from flowfactor import training
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
