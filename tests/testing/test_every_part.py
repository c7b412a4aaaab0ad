"""The public checks over every part of flowfactor, and that every part is in the table of constructors."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import constructors as table
import pytest
import torch
from constructors import DEVICE, build

import flowfactor as ff
from flowfactor import testing

pytestmark = pytest.mark.contract

# A prior of a borrowed encoder converts, moves and saves its pseudo-inputs alone: its model does so with the encoder.
EXCUSED = {"vamp": ["double"]}


@pytest.mark.parametrize("name", table.POTENTIALS)
def test_potentials_keep_their_promises(name: str) -> None:
    testing.check_potential(build(table.POTENTIALS, name))


@pytest.mark.parametrize("name", table.FIELDS)
def test_fields_keep_their_promises(name: str) -> None:
    testing.check_field(build(table.FIELDS, name))


@pytest.mark.parametrize("name", table.PRIORS)
def test_priors_keep_their_promises(name: str) -> None:
    testing.check_prior(build(table.PRIORS, name), without=EXCUSED.get(name, ()))


@pytest.mark.parametrize("name", table.ENCODERS)
def test_encoders_keep_their_promises(name: str) -> None:
    testing.check_encoder(build(table.ENCODERS, name), table.ENCODER_SHAPES.get(name))


@pytest.mark.parametrize("name", table.DECODERS)
def test_decoders_keep_their_promises(name: str) -> None:
    testing.check_decoder(build(table.DECODERS, name))


@pytest.mark.parametrize("name", table.OBJECTIVES)
def test_objectives_keep_their_promises(name: str) -> None:
    testing.check_objective(build(table.OBJECTIVES, name))


@pytest.mark.parametrize("name", table.ESTIMATORS)
def test_estimators_keep_their_promises(name: str) -> None:
    testing.check_estimator(build(table.ESTIMATORS, name))


@pytest.mark.parametrize("name", table.MODELS)
def test_models_keep_their_promises(name: str) -> None:
    testing.check_model(build(table.MODELS, name), num_frames=table.STEPS + 1)


@pytest.mark.parametrize("name", table.DATASETS)
def test_data_sets_keep_their_promises(name: str, tmp_path: Path) -> None:
    testing.check_dataset(table.DATASETS[name](tmp_path).to(DEVICE))


def public(package: Any, base: type | tuple[type, ...]) -> set[type]:
    """The public classes of a package that are parts of one kind."""
    names = getattr(package, "__all__", vars(package))
    return {cls for name in names if inspect.isclass(cls := getattr(package, name)) and issubclass(cls, base)}


BASES = {
    "potentials": {ff.potentials.Potential},
    "fields": {ff.fields.Field},
    "priors": {ff.priors.Prior, ff.priors.GaussianPrior},
    "encoders": {ff.encoders.GaussianEncoder},
    "decoders": {ff.encoders.Decoder},
    "objectives": {ff.objectives.Objective},
    "estimators": {ff.models.FactorEstimator},
    "models": set(),
    "data sets": {ff.data.SequenceDataset, ff.data.FactorSequences, ff.data.CombinedSequences},
}
"""What is there to derive from, and no part by itself."""

KINDS = {
    "potentials": (table.POTENTIALS, public(ff.potentials, ff.potentials.Potential)),
    "fields": (table.FIELDS, public(ff.fields, ff.fields.Field)),
    "priors": (table.PRIORS, public(ff.priors, (ff.priors.Prior, ff.priors.SpikeAndSlab))),
    "encoders": (
        table.ENCODERS,
        {cls for cls in public(ff.encoders, torch.nn.Module) if cls.__name__.endswith("Encoder")},
    ),
    "decoders": (table.DECODERS, public(ff.encoders, ff.encoders.Decoder)),
    "objectives": (table.OBJECTIVES, public(ff.objectives, ff.objectives.Objective)),
    "estimators": (table.ESTIMATORS, public(ff.models, ff.models.FactorEstimator)),
    "models": (
        table.MODELS,
        {cls for cls in public(ff.models, torch.nn.Module) if hasattr(cls, "save_pretrained")},
    ),
    "data sets": (table.DATASETS, public(ff.data, ff.data.SequenceDataset)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_public_class_is_in_the_table(kind: str, tmp_path: Path) -> None:
    entries, known = KINDS[kind]
    made: set[type] = set()
    for name, make in entries.items():
        folder = tmp_path / name
        folder.mkdir()
        made.add(type(make(folder)) if kind == "data sets" else type(make()))
    missing = sorted(cls.__name__ for cls in known - BASES[kind] - made)
    assert missing == [], (
        f"give each an entry in tests/constructors.py, from which all contract tests are made: {missing}"
    )


def test_every_method_is_in_the_table() -> None:
    assert set(ff.models.METHODS) <= set(table.MODELS)


@pytest.mark.parametrize(("name", "value"), [("FLOWFACTOR_TEST_DTYPE", "float16"), ("FLOWFACTOR_TEST_DEVICE", "tpu")])
def test_a_wrong_setting_is_refused(name: str, value: str) -> None:
    known = {"float32": 1} if name.endswith("DTYPE") else table.devices()
    with pytest.raises(ValueError, match=rf"{name} must be one of .*, got '{value}'"):
        table.setting(name, known, {name: value})
    assert table.setting(name, known, {}) == next(iter(known.values()))
