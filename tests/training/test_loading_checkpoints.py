"""`FlowModule.load_from_checkpoint`, and checkpoints of models with compiled parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import SIZES, small_run
from test_lightning import _data, _module, _trainer, pytestmark  # noqa: F401 (the marks are this file's too)
from torch import nn

import flowfactor as ff
from flowfactor.models import METHODS, load_pretrained
from flowfactor.training import FlowModule, LearningRateSchedule, SequenceData, load_run, train


class Own(nn.Module):
    """An encoder that is not flowfactor's."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.encoder(*args, **kwargs)


def _same(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def _saved(folder: Path, module: FlowModule, **settings: Any) -> Path:
    kept = ModelCheckpoint(folder, filename="kept", every_n_train_steps=2)
    _trainer(folder, max_steps=2, callbacks=[kept], **settings).fit(module, datamodule=SequenceData(_data(), 6))
    return folder / "kept.ckpt"


@pytest.mark.parametrize("method", METHODS)
def test_a_runs_checkpoint_makes_its_model(method: str, tmp_path: Path) -> None:
    sizes = SIZES | {"latent_dim": 12, "hidden": [16]}
    if method != "factor-vae":
        del sizes["hidden"]
    train(small_run(tmp_path, sizes, method, steps=2, evaluate_limit=2, likelihood_limit=0, learning_rate=2e-3))
    module = FlowModule.load_from_checkpoint(tmp_path / "last.ckpt")
    model = load_run(tmp_path)[0]
    assert type(module.model) is type(model)
    _same(module.model, model)
    assert module.learning_rate == 2e-3 and module.schedule.steps == 2 and module.betas == (0.9, 0.99)


def test_modelcheckpoints_files_make_their_model_and_settings_may_be_replaced(tmp_path: Path) -> None:
    module = _module()
    path = _saved(tmp_path, module)
    loaded = FlowModule.load_from_checkpoint(path, learning_rate=0.5, schedule=LearningRateSchedule(steps=3))
    _same(loaded.model, module.model)
    assert loaded.learning_rate == 0.5 and loaded.schedule.steps == 3 and loaded.elapsed == 0
    torch.load(path, weights_only=True)


def test_parts_of_ones_own_are_handed_over(tmp_path: Path) -> None:
    module = _module()
    module.model.encoder = Own(module.model.encoder)  # type: ignore[assignment,arg-type]
    path = _saved(tmp_path, module)
    with pytest.raises(ValueError, match=r"encoder is a part of the user's own.*load_from_checkpoint\(path, encoder="):
        FlowModule.load_from_checkpoint(path)
    fresh = _module().model
    loaded = FlowModule.load_from_checkpoint(path, encoder=Own(fresh.encoder))  # type: ignore[arg-type]
    _same(loaded.model, module.model)
    fresh.encoder = Own(_module().model.encoder)  # type: ignore[assignment,arg-type]
    _same(FlowModule.load_from_checkpoint(path, model=fresh).model, module.model)
    with pytest.raises(ValueError, match="no parts"):
        FlowModule.load_from_checkpoint(path, encodr=fresh.encoder)
    with pytest.raises(ValueError, match="does not fit the model that was handed over"):
        FlowModule.load_from_checkpoint(path, model=nn.Linear(2, 2))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    train(small_run(tmp_path / "run", steps=2, evaluate_limit=2, likelihood_limit=0))
    whole = (tmp_path / "run" / "last.ckpt").read_bytes()
    kept = _saved(tmp_path / "kept", _module()).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    bad = tmp_path / "bad.ckpt"
    for contents in (bytes(flipped), whole[:-100], kept[:-100], b"", b"what"):
        bad.write_bytes(contents)
        with pytest.raises(ValueError, match=r"bad\.ckpt is damaged"):
            FlowModule.load_from_checkpoint(bad)
    torch.save({"state_dict": {}}, bad)
    with pytest.raises(ValueError, match=r"bad\.ckpt is no checkpoint of a FlowModule"):
        FlowModule.load_from_checkpoint(bad)
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        FlowModule.load_from_checkpoint(tmp_path / "none.ckpt")


def test_a_checkpoint_of_an_earlier_release_asks_for_the_model(tmp_path: Path) -> None:
    module = _module()
    path = _saved(tmp_path, module)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["flowfactor"]["module"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="hand over model= and schedule="):
        FlowModule.load_from_checkpoint(path)
    with pytest.raises(ValueError, match="model="):
        FlowModule.load_from_checkpoint(path, schedule=LearningRateSchedule(steps=2))
    fresh = ff.models.build_vae((1, 8, 8), 2, 4, hidden=(8, 8), augment_dim=0)
    _same(
        FlowModule.load_from_checkpoint(path, model=fresh, schedule=LearningRateSchedule(steps=2)).model, module.model
    )


def test_a_checkpoint_that_asks_for_a_huge_model_is_refused_before_it_is_made(tmp_path: Path) -> None:
    path = _saved(tmp_path, _module())
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["flowfactor"]["module"]["model"]["parts"]["encoder"]["arguments"]["widths"] = [10**7, 10**7]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"kept\.ckpt"):
        FlowModule.load_from_checkpoint(path)


def _compiled(module: FlowModule) -> FlowModule:
    module.model.decoder = torch.compile(module.model.decoder, backend="eager")  # type: ignore[assignment,arg-type]
    return module


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by the compiler itself
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_compiled_parts_are_resumed_and_loaded(before: bool, after: bool, tmp_path: Path) -> None:
    first = _compiled(_module()) if before else _module()
    path = _saved(tmp_path, first)
    assert not any("_orig_mod" in name for name in torch.load(path, weights_only=True)["state_dict"])
    whole, resumed = _module(), _compiled(_module()) if after else _module()
    for module, start in ((whole, None), (resumed, path)):
        trainer = _trainer(tmp_path, max_steps=4, enable_checkpointing=False)
        trainer.fit(module, datamodule=SequenceData(_data(), 6), ckpt_path=start, weights_only=True)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    loaded = FlowModule.load_from_checkpoint(path)
    for one, other in zip(first.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)
    given = FlowModule.load_from_checkpoint(path, model=resumed.model)
    for one, other in zip(first.parameters(), given.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_part_is_saved_as_what_it_is_made_of(tmp_path: Path) -> None:
    model: Any = _compiled(_module()).model
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
