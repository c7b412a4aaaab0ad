"""Data sets by name: what a configuration opens, and what it says where it cannot."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import write_mnist

import flowfactor as ff
from flowfactor.cli import main
from flowfactor.comparison.worker import execute
from flowfactor.data import CombinedImages, CombinedScenes
from flowfactor.training import Config, DataConfig, load_run, prepare, train

SMALL_SCENES = {"size": 8, "hues": 3, "scales": 3, "orientations": 2, "supersampling": 1}


def write_shapes3d(path: Path) -> Path:
    sizes = (3, 3, 3, 3, 2, 3)
    states = np.array(list(itertools.product(*map(range, sizes))))
    with h5py.File(path, "w") as file:
        file["images"] = np.broadcast_to(
            (states.sum(1) * 10).astype(np.uint8)[:, None, None, None], (len(states), 8, 8, 3)
        )
        file["labels"] = states / 10
    return path


def write_falcor3d(folder: Path) -> Path:
    states = np.array(list(itertools.product(*map(range, (2, 3, 3, 2, 2, 2, 2)))))
    (folder / "images").mkdir(parents=True)
    with (folder / "train-rec.labels").open("wb") as file:
        np.save(file, states / 2)
    for n, row in enumerate(states):
        Image.fromarray(np.full((4, 4, 3), row.sum(), np.uint8)).save(folder / "images" / f"{n:06}.png")
    return folder


def test_published_sets_are_opened_by_name(tmp_path: Path) -> None:
    shapes = DataConfig("shapes3d", root=str(write_shapes3d(tmp_path / "3dshapes.h5")), steps=2)
    assert shapes.dataset("train").flow_names == ("floor_hue", "wall_hue", "object_hue", "scale")
    chosen = DataConfig("shapes3d", root=shapes.root, steps=2, flows=["scale", "wall_hue"], limit=5)
    assert chosen.dataset("test").flow_names == ("scale", "wall_hue") and len(chosen.dataset("train")) == 5
    falcor = DataConfig("falcor3d", root=str(write_falcor3d(tmp_path / "falcor")), steps=1, options={"held_out": 0.3})
    assert falcor.dataset("test").num_flows == 7 and falcor.dataset("test").image_shape == (3, 4, 4)


@pytest.mark.parametrize(
    "name", ["mnist", "mnist-combined", "shapes3d", "dsprites", "falcor3d", "isaac3d", "smallnorb"]
)
def test_missing_files_are_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        DataConfig(name, root=str(tmp_path / "none"), steps=2).dataset()


def test_damaged_files_are_told_before_any_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_shapes3d(tmp_path / "3dshapes.h5")
    path.write_bytes(path.read_bytes()[:5000])
    (tmp_path / "dsprites.npz").write_text("these are no arrays")
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01")
    for name, what in (("shapes3d", "3dshapes.h5"), ("dsprites", "dsprites.npz"), ("mnist", "t10k-labels")):
        root = tmp_path / "dsprites.npz" if name == "dsprites" else tmp_path
        given = ["--data.name", name, "--data.root", str(root), "--data.steps", "2", "--output", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as ended:
            main(["train", "demo", *given])
        assert ended.value.code == 2 and what in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "cars"}, "data.name must be one of mnist, digits"),
        ({"name": "digits", "download": True}, "data.download fetches mnist"),
        ({"name": "digits", "flows": ["growth"]}, "scaling, rotation, colouring"),
        ({"name": "scenes", "flows": ["colour"]}, "floor_hue"),
        ({"name": "digits", "limit": 0}, "data.limit must be at least 1"),
        ({"name": "sequences"}, "needs data.root"),
    ],
)
def test_wrong_settings_are_told(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**values).dataset()
    with pytest.raises(TypeError, match="hue_steps"):
        DataConfig("digits", options={"hue_steps": 3}).dataset()


@pytest.mark.parametrize(("name", "value"), [("num_flows", 5), ("num_frames", 4), ("image_shape", [1, 28, 28])])
def test_sizes_that_are_not_the_datas_are_told(name: str, value: object, tmp_path: Path) -> None:
    config = Config.from_dict(
        {"data": {"name": "digits", "steps": 2}, "model": {name: value}, "train": {"steps": 1}, "output": str(tmp_path)}
    )
    with pytest.raises(ValueError, match=rf"model.{name} is .* the data set digits has .*scaling, rotation, colouring"):
        prepare(config)
    fitting = {"num_flows": 3, "num_frames": 3, "image_shape": [3, 28, 28], "latent_dim": 4}
    config.model = fitting
    assert prepare(config).model.num_flows == 3


def test_a_model_of_other_transformations_is_not_measured() -> None:
    model = ff.models.build_vae((3, 28, 28), 2, 4, hidden=(8, 8))
    with pytest.raises(ValueError, match="2 flows and the data set 3 transformations"):
        ff.metrics.equivariance_error(model, DataConfig("digits", steps=2).dataset("test"), limit=2)


def test_combined_sequences_are_trained_on_and_single_ones_measured(tmp_path: Path) -> None:
    options = {**SMALL_SCENES, "count": 40, "modes": ["superpose", "switch"], "seed": 3}
    data = DataConfig("scenes-combined", steps=2, flows=["floor_hue", "wall_hue", "scale"], options=options)
    combined, single = data.dataset("train"), data.dataset("test")
    assert isinstance(combined, CombinedScenes) and combined.modes == ("superpose", "switch") and len(combined) == 40
    assert type(single).__name__ == "Scenes" and single.flow_names == combined.flow_names
    assert torch.equal(combined.weights, data.dataset("train").weights)
    values = {
        "data": {"name": "scenes-combined", "steps": 2, "flows": data.flows, "options": options},
        "model": {"latent_dim": 4, "hidden": [8, 8], "warmup_span": 1},
        "train": {"steps": 2, "batch_size": 6, "evaluate_limit": 3, "likelihood_limit": 3, "likelihood_samples": 2}
        | {"tensorboard": False, "progress": False},
        "method": "sta",
        "output": str(tmp_path),
    }
    result = train(Config.from_dict(values))
    assert set(result["equivariance_error"]) == {"floor_hue", "wall_hue", "scale"} and "factor_accuracy" in result
    assert load_run(tmp_path)[1].data == data
    told = Config.from_dict(values | {"method": "ours", "model": {"latent_dim": 4}, "output": str(tmp_path / "new")})
    with pytest.raises(ValueError, match=r"no single transformation acts.*'ours'.*ours-weak, sta"):
        prepare(told)


def test_combined_digits_are_those_of_mnist(tmp_path: Path) -> None:
    config = DataConfig("mnist-combined", root=str(write_mnist(tmp_path)), steps=3, options={"strength": [0.5, 1.0]})
    made = config.dataset("train")
    assert isinstance(made, CombinedImages) and made.image_shape == (3, 28, 28)
    assert torch.equal(made.images, DataConfig("mnist", root=config.root, steps=3).dataset("train").images)
    assert float(made.weights[made.weights > 0].min()) >= 0.5
    assert type(config.dataset("test")).__name__ == "MNIST"
    mixed = config.dataset("test", combined=True)
    assert isinstance(mixed, CombinedImages) and torch.equal(mixed.images, config.dataset("test").images)
    with pytest.raises(ValueError, match="transformations combine in mnist-combined and scenes-combined, not in mnist"):
        DataConfig("mnist", root=config.root, steps=3).dataset("test", combined=True)


def test_spikes_are_measured_where_transformations_combine(tmp_path: Path) -> None:
    options = {**SMALL_SCENES, "count": 20, "modes": ["superpose"]}
    config = {
        "data": {
            "name": "scenes-combined",
            "steps": 2,
            "flows": ["floor_hue", "wall_hue", "scale"],
            "options": options,
        },
        "model": {"latent_dim": 4, "hidden": [8, 8], "warmup_span": 1},
        "train": {"steps": 1, "batch_size": 6, "tensorboard": False, "progress": False},
        "method": "sta",
    }
    zero = {"likelihood_images": 0, "latent_images": 0, "factor_samples": 0, "vp_images": 0, "resamples": 0}
    evaluate = {"images": 6, "search_images": 1, **zero}
    (tmp_path / "settings.json").write_text(json.dumps({"config": config, "evaluate": evaluate}))
    made = execute(tmp_path)
    assert made is not None
    # Two of three act in each of six sequences, between three frames.
    assert made["figures"]["spikes"]["recall"]["count"] == 6 * 2 * 2
    assert made["figures"]["factor_accuracy"]["count"] == made["figures"]["equivariance"]["count"] * 3


def test_sequences_from_anywhere_are_trained_on_and_measured_both_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "data": {"name": "mnist", "root": str(write_mnist(tmp_path)), "steps": 2},
        "model": {"latent_dim": 4, "hidden": [8, 8], "frames_per_step": 1},
        "train": {"steps": 2, "batch_size": 6, "likelihood_limit": 0, "validate_every": 1, "progress": False},
        "output": str(tmp_path / "run"),
    }
    options = {"start": "any", "direction": "both", "ranges": {"rotation": [-90, 90]}}
    values["data"]["options"] = options
    config = Config.from_dict(values)
    data = config.data.dataset("train")
    assert (data.begins, data.runs) == ("any", "both")
    assert data.amounts([0, 1], 1)[..., 1].abs().max() <= 90
    again, other = (Config.from_dict(values).data.dataset(split) for split in ("test", "test"))
    assert torch.equal(again.batch([0, 1, 2])["frames"], other.batch([0, 1, 2])["frames"])
    result = train(config)
    found = result["combining"]
    assert found["start"] == "any"
    names = ["scaling", "rotation", "colouring"]
    assert [list(found[way]["error"]) for way in ("single", "backward", "untouched")] == [names] * 3
    assert set(found["superpose"]["over_singles"]) == {"scaling+rotation", "scaling+colouring", "rotation+colouring"}
    assert list(found["together"]["over_singles"]) == ["scaling+rotation+colouring"]
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["combining"] == found and len(written["commutator"]["mean"]) == 3
    assert written["group"]["addition"]["flows"] == names
    assert main(["evaluate", str(tmp_path / "run"), "--limit", "3", "--samples", "0"]) == 0
    told = capsys.readouterr().out
    for part in ("backwards", "both at once", "one after another", "from the untouched image", "begin anywhere"):
        assert part in told
    assert "three at once" in told and "in either order" in told and "as a group" in told


def test_combined_digits_from_anywhere(tmp_path: Path) -> None:
    options = {"start": "any", "direction": "both", "modes": ["superpose"]}
    config = DataConfig("mnist-combined", root=str(write_mnist(tmp_path)), steps=2, options=options)
    data = config.dataset("train")
    assert isinstance(data, CombinedImages)
    assert (data.begins, data.runs, data.modes) == ("any", "both", ("superpose",))
    scenes = DataConfig("scenes", steps=2, options=SMALL_SCENES | {"direction": "both"}).dataset("train")
    assert scenes.runs == "both"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {"start": "somewhere"}, "data.options.start"),
        ("digits", {"direction": "back"}, "data.options.direction"),
        ("digits", {"start": "any", "ranges": {"size": [1, 2]}}, "ranges names 'size'"),
    ],
)
def test_wrong_starts_are_told(name: str, options: dict, message: str, tmp_path: Path) -> None:
    root = str(write_mnist(tmp_path)) if name == "mnist" else None
    with pytest.raises(ValueError, match=message):
        DataConfig(name, root=root, options=options).dataset("test")


def test_validation_runs_both_ways_by_turns() -> None:
    flows = {"turn": (ff.data.Rotate(), 0.0, 40.0)}
    data = ff.data.TransformedImages(torch.rand(12, 1, 8, 8), flows, 2, start="any", direction="both")
    loader = ff.training.SequenceData(data, 4, val=data).val_dataloader()
    first, again = (list(loader) for _ in range(2))
    assert [float(batch["t"][-1]) for batch in first] == [2, -2, 2]
    assert all(torch.equal(one["frames"], other["frames"]) for one, other in zip(first, again, strict=True))
