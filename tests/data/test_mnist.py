"""MNIST: reading folders, downloads from a loopback server, and the digits of scikit-learn."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from flowfactor.data import MNIST, Digits, Rotate
from flowfactor.data.readers import mnist
from flowfactor.data.readers.download import download_file


def write_set(
    folder: Path, prefix: str = "t10k", count: int = 12, labels: int | None = None, zipped: bool = True
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = bytes((n * 37 + i) % 256 for n in range(count) for i in range(28 * 28))
    classes = bytes(n % 10 for n in range(count if labels is None else labels))
    files = {
        f"{prefix}-images-idx3-ubyte": bytes([0, 0, 8, 3]) + struct.pack(">3I", count, 28, 28) + pixels,
        f"{prefix}-labels-idx1-ubyte": bytes([0, 0, 8, 1]) + struct.pack(">I", len(classes)) + classes,
    }
    for name, data in files.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
        else:
            (folder / name).write_bytes(data)


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_a_folder(tmp_path: Path, zipped: bool) -> None:
    write_set(tmp_path, "t10k", zipped=zipped)
    data = MNIST(tmp_path, "test")
    assert len(data) == 12
    assert data.flow_names == ("scaling", "rotation", "colouring")
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert data.images.dtype == torch.uint8
    assert data.images[3, 0, 0, 5].item() == (3 * 37 + 5) % 256
    batch = data.batch([0, 1, 2], [0, 1, 2])
    assert batch["frames"].shape == (3, 9, 3, 28, 28)
    assert batch["frames"][:2, :, 1:].max() == 0  # red, but for the recoloured one
    assert batch["frames"][2, 6, 1].max() > 0.9  # 120 degrees on, red is green
    assert batch["frames"][2, 6, 0].max() < 1e-6


def test_the_papers_amounts_and_longer_sequences(tmp_path: Path) -> None:
    write_set(tmp_path)
    amounts = {name: part[1].tolist() for name, part in MNIST(tmp_path, "test").transforms.items()}
    assert amounts["scaling"] == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8])
    assert amounts["rotation"] == pytest.approx([0, 10, 20, 30, 40, 50, 60, 70, 80])
    assert amounts["colouring"] == pytest.approx([0, 20, 40, 60, 80, 100, 120, 140, 160])
    longer = MNIST(tmp_path, "test", steps=11)
    assert longer.transforms["rotation"][1].tolist() == pytest.approx(list(range(0, 111, 10)))


def test_grey_digits_and_other_transformations(tmp_path: Path) -> None:
    write_set(tmp_path)
    grey = MNIST(tmp_path, "test", colour=None)
    assert grey.flow_names == ("scaling", "rotation")
    assert grey.image_shape == (1, 28, 28)
    other = MNIST(tmp_path, "test", transforms={"back": (Rotate(), 0, -80)}, colour="blue")
    assert other.flow_names == ("back",)
    assert other[0]["frames"][:, :2].max() == 0


def test_where_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "given")
    write_set(tmp_path / "home" / ".cache" / "flowfactor" / "mnist", count=5)
    monkeypatch.setenv("FLOWFACTOR_MNIST", str(tmp_path / "given"))
    assert len(MNIST(split="test")) == 12
    monkeypatch.delenv("FLOWFACTOR_MNIST")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(MNIST(split="test")) == 5
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*FLOWFACTOR_MNIST.*download=True"):
        MNIST(split="train")


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    write_set(tmp_path / "a", labels=11)
    with pytest.raises(ValueError, match=r"holds 12 images, but .* 11 labels"):
        MNIST(tmp_path / "a", "test")
    write_set(tmp_path / "b")
    images, labels = (tmp_path / "b" / f"t10k-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    images.write_bytes(labels.read_bytes())
    with pytest.raises(ValueError, match=r"expected uint8 images \[N, H, W\]"):
        MNIST(tmp_path / "b", "test")
    write_set(tmp_path / "c")
    labels = tmp_path / "c" / labels.name
    labels.write_bytes((tmp_path / "c" / images.name).read_bytes())
    with pytest.raises(ValueError, match=r"expected integer labels \[N\]"):
        MNIST(tmp_path / "c", "test")
    with pytest.raises(ValueError, match="'train' or 'test'"):
        MNIST(tmp_path, "validation")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on the loopback address, and the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", folder
        http.shutdown()
        thread.join()


@pytest.fixture
def checksums(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(server[1] / "good")
    for file in (server[1] / "good").iterdir():
        monkeypatch.setitem(mnist.MNIST_MD5, file.name, hashlib.md5(file.read_bytes()).hexdigest())


@pytest.mark.usefixtures("checksums")
def test_download_tries_mirrors_in_turn_and_reads(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    write_set(folder / "bad", count=3)
    mirrors = [f"{url}/nothing/", f"{url}/bad", f"{url}/good/"]
    data = MNIST(tmp_path / "new" / "mnist", "test", download=True, mirrors=mirrors)
    assert len(data) == 12
    names = sorted(path.name for path in (tmp_path / "new" / "mnist").iterdir())
    assert names == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
    # What is there is not fetched again.
    assert len(MNIST(tmp_path / "new" / "mnist", "test", download=True, mirrors=[])) == 12


@pytest.mark.usefixtures("checksums")
def test_a_bad_checksum_leaves_nothing_behind(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    write_set(folder / "bad", count=3)
    with pytest.raises(ConnectionError, match=r"(?s)bad/t10k-images.*MD5 \w+, expected \w+.*nothing/.*404.*by hand"):
        MNIST(tmp_path / "new", "test", download=True, mirrors=[f"{url}/bad", f"{url}/nothing"])
    assert list((tmp_path / "new").iterdir()) == []


def test_addresses_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="not-an-address"):
        download_file(tmp_path / "file", ["not-an-address"], md5="0")
    with pytest.raises(ConnectionError, match="no address was given"):
        download_file(tmp_path / "file", [], md5="0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("FLOWFACTOR_MNIST" not in os.environ, reason="FLOWFACTOR_MNIST names no folder with MNIST's files")
@pytest.mark.parametrize(("split", "count"), [("train", 60000), ("test", 10000)])
def test_real_mnist(split: str, count: int) -> None:
    data = MNIST(split=split)
    assert data.images.shape == (count, 1, 28, 28)
    assert data.labels[:5].tolist() == ([5, 0, 4, 1, 9] if split == "train" else [7, 2, 1, 0, 4])
    assert data.images.float().mean().item() == pytest.approx(33.32 if split == "train" else 33.79, abs=0.01)


@pytest.mark.skipif("FLOWFACTOR_MNIST" not in os.environ, reason="FLOWFACTOR_MNIST names no folder with MNIST's files")
def test_what_doing_nothing_scores_on_real_mnist() -> None:
    """The error of a model that does nothing, |x_t - x_0| summed over time, pixels and channels."""
    data = MNIST(split="test")
    still = []
    for k in range(3):
        frames = data.batch(range(1000), k)["frames"]
        still.append((frames[:, 1:] - frames[:, :1]).abs().sum((1, 2, 3, 4)).mean().item())
    assert still == pytest.approx([1267, 841, 1141], rel=0.02)


class TestDigits:
    def test_the_split_is_fixed_disjoint_and_in_proportion(self) -> None:
        train, test, every = (Digits(split).labels for split in ("train", "test", "all"))
        assert (len(train), len(test), len(every)) == (1500, 297, 1797)
        share = test.bincount() / every.bincount()
        assert (share - 297 / 1797).abs().max() < 0.005
        assert torch.equal(train.bincount() + test.bincount(), every.bincount())

    def test_no_picture_is_in_both(self) -> None:
        train, test, every = (Digits(split).images.flatten(1) for split in ("train", "test", "all"))
        both = torch.cat([train, test])
        rows = [{bytes(row.numpy()) for row in part} for part in (both, every)]
        assert rows[0] == rows[1]
        assert not {bytes(row.numpy()) for row in train} & {bytes(row.numpy()) for row in test}

    def test_digits_look_like_mnist(self) -> None:
        data = Digits("test")
        pictures = data.images[:, 0].float() / 255
        assert data.images.shape == (297, 1, 28, 28)
        rim = torch.ones(28, 28, dtype=torch.bool)
        rim[3:-3, 2:-2] = False
        assert pictures[:, rim].max() < 0.05  # a margin, as MNIST's digits have
        assert pictures.amax((1, 2)).min() > 0.9  # strokes in full brightness
        assert 0.11 < pictures.mean() < 0.17  # MNIST: 0.13
        extremes = ((pictures < 0.1) | (pictures > 0.9)).float().mean()
        assert extremes > 0.85  # black and white, little grey

    def test_sequences(self) -> None:
        data = Digits("train")
        assert data.flow_names == ("scaling", "rotation", "colouring")
        assert [batch["k"].bincount().tolist() for batch in data.batches(300)] == [[100, 100, 100]] * 5
        assert Digits("test", colour=None, steps=4).image_shape == (1, 28, 28)

    def test_a_wrong_split(self) -> None:
        with pytest.raises(ValueError, match="'train', 'test' or 'all'"):
            Digits("validation")


def test_paper_transforms_keep_their_pace_however_long() -> None:
    every = ("scaling", "rotation", "colouring", "rotation+hue", "perspective")
    for steps in (4, 8):
        images = torch.rand(1, 3, 9, 9)
        frames = {}
        for name, (transform, start, end) in mnist.paper_transforms(steps, every).items():
            frames[name] = transform(images, torch.linspace(start, end, steps + 1))
        assert tuple(frames) == every
        for name, amount in (("scaling", 1.1), ("rotation", 10.0), ("colouring", 20.0), ("perspective", 7.5)):
            transform = mnist.paper_transforms(steps, every)[name][0]
            torch.testing.assert_close(frames[name][:, 1], transform(images, [amount])[:, 0], atol=1e-5, rtol=0)
        turned = mnist.Hue()(mnist.Rotate()(images, [10.0])[:, 0], [20.0])[:, 0]
        torch.testing.assert_close(frames["rotation+hue"][:, 1], turned, atol=1e-5, rtol=0)
    assert list(mnist.paper_transforms(20)) == ["scaling", "rotation", "colouring"]
    with pytest.raises(ValueError, match="names must be distinct names out of scaling"):
        mnist.paper_transforms(8, ("shear",))
    with pytest.raises(ValueError, match="must stay below 90, got 12 steps"):
        mnist.paper_transforms(12, ("perspective",))


@pytest.mark.parametrize("place", ["MNIST/raw", "FashionMNIST/raw", "raw"])
def test_the_folder_that_torchvision_made_is_found(tmp_path: Path, place: str) -> None:
    write_set(tmp_path / place, "t10k")
    assert len(MNIST(tmp_path, "test")) == 12


def test_of_several_folders_of_torchvisions_mnist_is_mnists_and_others_have_to_be_chosen(tmp_path: Path) -> None:
    write_set(tmp_path / "FashionMNIST" / "raw", "t10k", count=5)
    write_set(tmp_path / "KMNIST" / "raw", "t10k", count=6)
    with pytest.raises(ValueError, match=r"several data sets of MNIST's format: give root= one of .*FashionMNIST"):
        MNIST(tmp_path, "test")
    write_set(tmp_path / "MNIST" / "raw", "t10k")
    assert len(MNIST(tmp_path, "test")) == 12


def test_emnists_pictures_are_turned_upright_and_its_split_is_chosen(tmp_path: Path) -> None:
    write_set(tmp_path, "t10k", zipped=False)
    plain = MNIST(tmp_path, "test", colour=None).images
    for variant in ("letters", "digits"):
        for file in tmp_path.glob("t10k-*"):
            name = file.name.replace("t10k", f"emnist-{variant}-test")
            (tmp_path / "EMNIST" / "raw").mkdir(parents=True, exist_ok=True)
            (tmp_path / "EMNIST" / "raw" / name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"several of EMNIST's splits \(digits, letters\): choose one by variant="):
        MNIST(tmp_path / "EMNIST", "test")
    emnist = MNIST(tmp_path / "EMNIST", "test", colour=None, variant="letters").images
    assert torch.equal(emnist, plain.transpose(2, 3))


def test_kmnists_npz_files_are_read_and_damage_is_told(tmp_path: Path) -> None:
    pictures = np.arange(4 * 28 * 28, dtype=np.uint32).reshape(4, 28, 28).astype(np.uint8)
    np.savez_compressed(tmp_path / "kmnist-test-imgs.npz", pictures)
    np.savez_compressed(tmp_path / "kmnist-test-labels.npz", np.arange(4, dtype=np.uint8))
    data = MNIST(tmp_path, "test", colour=None)
    assert torch.equal(data.images[:, 0], torch.from_numpy(pictures)) and data.labels.tolist() == [0, 1, 2, 3]
    (tmp_path / "kmnist-test-imgs.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"kmnist-test-imgs\.npz is not a whole npz file"):
        MNIST(tmp_path, "test")


def test_what_a_folder_without_the_files_holds_is_told(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"it holds notes\.txt, sub/; sub/ holds deeper/"):
        MNIST(tmp_path)
