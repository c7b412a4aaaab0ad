"""Lightning's contract: epochs that end, validation, checkpoints by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import flowfactor as ff
from flowfactor.training import FlowModule, LearningRateSchedule, SequenceData

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Be aware that when using"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]


def _data() -> ff.data.TransformedImages:
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    flows = {"turn": (ff.data.Rotate(), 0, 40), "grow": (ff.data.Scale(), 1, 1.5)}
    return ff.data.TransformedImages(images, flows, steps=2)


def _module() -> FlowModule:
    torch.manual_seed(0)
    model = ff.models.build_vae((1, 8, 8), 2, 4, hidden=(8, 8), augment_dim=0)
    return FlowModule(model, LearningRateSchedule(steps=1000), learning_rate=1e-3)


def _trainer(folder: Path, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_ends_with_its_batches(tmp_path: Path, epochs: int) -> None:
    trainer = _trainer(tmp_path, max_epochs=epochs, max_steps=50, enable_checkpointing=False)
    trainer.fit(_module(), datamodule=SequenceData(_data(), 6))
    assert trainer.global_step == 4 * epochs
    assert trainer.current_epoch == epochs


def test_validation_is_logged_kept_by_and_stopped_on(tmp_path: Path) -> None:
    data = _data()
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    stop = EarlyStopping("val_loss", patience=1, min_delta=1e6)
    trainer = _trainer(tmp_path, max_epochs=9, callbacks=[best, stop])
    trainer.fit(_module(), datamodule=SequenceData(data.subset(range(18)), 6, val=data.subset(range(18, 24))))
    assert trainer.current_epoch == 2  # one epoch without gain is enough
    assert best.best_model_score is not None and best.best_model_score.isfinite()
    assert {"val_loss", "val_kl"} & set(trainer.callback_metrics) >= {"val_loss"}
    assert Path(best.best_model_path).is_file()


def test_validating_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    weights = []
    for val in (None, _data()):
        module = _module()
        trainer = _trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
        trainer.fit(module, datamodule=SequenceData(_data(), 6, val=val))
        weights.append(torch.cat([p.detach().flatten() for p in module.model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("stop_at", [4, 6])
def test_a_training_by_epochs_resumes_as_if_undisturbed(tmp_path: Path, stop_at: int) -> None:
    whole = _module()
    _trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(whole, datamodule=SequenceData(_data(), 6))
    kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop_at, save_top_k=-1)
    _trainer(tmp_path, max_epochs=3, callbacks=[kept]).fit(_module(), datamodule=SequenceData(_data(), 6))
    resumed = _module()
    trainer = _trainer(tmp_path, max_epochs=3, enable_checkpointing=False)
    trainer.fit(
        resumed, datamodule=SequenceData(_data(), 6), ckpt_path=tmp_path / f"step={stop_at}.ckpt", weights_only=True
    )
    assert trainer.global_step == 12
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("stop_at", [2, 4, 6, 7])
def test_an_epoch_stopped_in_its_middle_is_gone_on_with(tmp_path: Path, stop_at: int, validated: bool) -> None:
    settings = {"max_epochs": 3, "enable_checkpointing": False, "val_check_interval": 2 if validated else None}
    val = _data().subset(range(18, 24)) if validated else None
    whole, first, resumed = _module(), _module(), _module()
    _trainer(tmp_path, **settings).fit(whole, datamodule=SequenceData(_data(), 6, val=val))
    stopped = _trainer(tmp_path, max_steps=stop_at, **settings)
    stopped.fit(first, datamodule=SequenceData(_data(), 6, val=val))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    trainer = _trainer(tmp_path, **settings)
    trainer.fit(
        resumed, datamodule=SequenceData(_data(), 6, val=val), ckpt_path=tmp_path / "stopped.ckpt", weights_only=True
    )
    assert (trainer.global_step, trainer.current_epoch) == (12, 3)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
