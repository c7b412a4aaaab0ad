"""Two data sets of one name: no run goes on with, or tells figures of, data that are not its own."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import TINY, write_mnist

from flowfactor.cli import main
from flowfactor.data import CombinedImages, Scenes, Sequences, TransformedImages, paper_transforms
from flowfactor.training import DataConfig


def other_mnist(folder: Path) -> Path:
    """As many pictures of the same size as `write_mnist`'s, but others."""
    write_mnist(folder)
    for prefix in ("train", "t10k"):
        images = np.random.default_rng(1).integers(0, 256, (30, 28, 28), dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, 30, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes(), 1))
    return folder


def test_a_benchmark_does_not_take_figures_of_another_data_set_of_its_name(
    tmp_path: Path, refused: Callable[[list[str]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    budget = ["--steps", "1", "--workers", "0", "--threads", "1", "--evaluate.images", "3", "--evaluate.vp_images", "0"]
    command = [
        "benchmark",
        "mnist",
        "--methods",
        "vae",
        "--seeds",
        "0",
        *budget,
        *TINY,
        "--output",
        str(tmp_path / "b"),
    ]
    assert main([*command, "--data.root", str(write_mnist(tmp_path / "one"))]) == 0
    told = refused([*command, "--data.root", str(other_mnist(tmp_path / "other"))])
    assert "holds a run on other data (train: contents" in told and "test: contents" in told and "data.root" in told
    capsys.readouterr()
    moved = tmp_path / "moved"
    (tmp_path / "one").rename(moved)
    assert main([*command, "--data.root", str(moved)]) == 0
    assert "1 of 1 runs are finished already" in capsys.readouterr().out


def test_a_worker_does_not_train_on_data_that_changed_after_the_plan(tmp_path: Path) -> None:
    from flowfactor.comparison import choose_variants, plan_benchmark
    from flowfactor.training.config import Config

    settings = {"data": {"name": "mnist", "root": str(write_mnist(tmp_path / "one")), "steps": 2}}
    model = {"latent_dim": 4, "hidden": [8, 8], "encoder": {"widths": [8]}, "decoder": {"widths": [8]}}
    config = Config.from_dict(settings | {"model": model, "train": {"batch_size": 6}})
    plan = plan_benchmark(config, choose_variants(["vae"]), tmp_path / "b", seeds=[0], steps=1, workers=0, threads=1)
    other_mnist(tmp_path / "one")
    assert not plan.run(lambda line: None)
    assert "the data have changed since the benchmark was planned" in plan.failures["vae, seed 0"]


def test_a_run_is_not_resumed_on_other_data(
    tmp_path: Path, refused: Callable[[list[str]], str], interrupt: Callable[[int], None]
) -> None:
    run = tmp_path / "run"
    command = ["train", "mnist-small", *TINY, "--train.steps", "4", "--train.evaluate_limit", "2", "--output", str(run)]
    command += ["--train.likelihood_limit", "0", "--data.root"]
    interrupt(1)
    assert main([*command, str(write_mnist(tmp_path / "one"))]) == 130
    told = refused([*command, str(other_mnist(tmp_path / "other")), "--resume"])
    assert "was trained on other data" in told and "data.root" in told and str(run) in told
    # A copy elsewhere, packed in another way, is the same data.
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "one", copy)
    for file in list(copy.glob("*.gz")):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    assert main([*command, str(copy), "--resume"]) == 0
    for content in ("{", "[" * 100_000, "{}", '{"train": 1, "test": {}}'):  # what says nothing is not agreed with
        (run / "data.json").write_text(content)
        assert "data.json is damaged" in refused([*command, str(copy), "--resume"])


def test_other_data_are_measured_on_purpose_alone_and_the_evaluation_says_so(
    tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    run = tmp_path / "run"
    train = ["train", "mnist-small", *TINY, "--train.steps", "1", "--train.evaluate_limit", "2", "--output", str(run)]
    train += ["--train.likelihood_limit", "0", "--data.root", str(write_mnist(tmp_path / "one"))]
    assert main(train) == 0
    other = str(other_mnist(tmp_path / "other"))
    evaluate = ["evaluate", str(run), "--limit", "2", "--samples", "0"]
    told = refused([*evaluate, "--root", other])
    assert "was trained on other data (test: contents" in told and "--other-data" in told
    assert "was trained on other data" in refused(["traverse", str(run), "--root", other])
    assert not (run / "evaluation.json").exists() and not (run / "traversal.png").exists()
    assert main([*evaluate, "--root", other, "--other-data"]) == 0
    written = json.loads((run / "evaluation.json").read_text())["other_data"]
    assert written["differences"][0].startswith("test: contents") and written["data"]["test"]["elements"] == 30
    assert main(evaluate) == 0
    assert "other_data" not in json.loads((run / "evaluation.json").read_text())
    (run / "data.json").unlink()
    with pytest.warns(UserWarning, match="does not say which data it was trained on"):
        assert main(evaluate) == 0


def test_fingerprints_tell_data_apart_and_know_them_again() -> None:
    images = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flows = paper_transforms(2)

    def made(pictures: torch.Tensor, **given: object) -> TransformedImages:
        return TransformedImages(pictures, flows, 2, colour="red", **given)

    one = made(images).fingerprint()
    assert json.loads(json.dumps(one)) == one
    assert made(images.clone()).fingerprint() == one == made(images.float() / 255).fingerprint()
    assert made(255 - images).fingerprint()["sha256"] != one["sha256"]
    assert made(images[:49]).fingerprint()["elements"] == 49
    labelled = [made(images, labels=labels).fingerprint()["sha256"] for labels in (torch.zeros(50), torch.ones(50))]
    assert labelled[0] != labelled[1]
    combined = [CombinedImages(pictures, flows, 2, colour="red").fingerprint() for pictures in (images, 255 - images)]
    assert combined[0]["class"] == "CombinedImages" and combined[0]["sha256"] != combined[1]["sha256"]
    frames = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    named = [Sequences(frames, k=k).fingerprint()["sha256"] for k in ([0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1])]
    assert named[0] != named[1]
    scenes = [Scenes("test", size=8, steps=2, hues=hues, scales=4, orientations=3).fingerprint() for hues in (4, 5)]
    assert scenes[0]["sha256"] != scenes[1]["sha256"]


@pytest.mark.parametrize("name", ["digits", "scenes-combined"])
def test_every_kind_of_data_set_has_a_fingerprint_of_each_split(name: str) -> None:
    options = {"size": 8, "hues": 4, "scales": 4, "orientations": 3, "count": 40} if name != "digits" else {}
    data = DataConfig(name, steps=2, options=options)  # type: ignore[arg-type]
    train, test = data.dataset("train").fingerprint(), data.dataset("test").fingerprint()
    assert train["sha256"] != test["sha256"] and data.dataset("train").fingerprint() == train
