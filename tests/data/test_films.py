"""Files of frames, and the folders they lie in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from film_files import noise, write_array, write_pages, write_pictures, write_video

from flowfactor.data import Sequences

HAS_AV = bool(__import__("importlib.util").util.find_spec("av"))
VIDEO = pytest.mark.skipif(not HAS_AV, reason="PyAV is not installed (extra 'video')")


@pytest.mark.parametrize("ending", [".npy", ".npz", ".gif", ".tif", ".webp", pytest.param(".mkv", marks=VIDEO)])
@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 3)], ids=["grey", "colour"])
def test_a_file_of_frames_is_a_sequence(tmp_path: Path, ending: str, shape: tuple[int, ...]) -> None:
    films = {name: noise(5, n, shape) for n, name in enumerate(["left/a", "left/b", "right/a"])}
    if ending == ".gif":  # 256 colours only
        films = {name: film // 128 * 255 for name, film in films.items()}
    for name, film in films.items():
        file = tmp_path / f"{name}{ending}"
        if ending in (".npy", ".npz"):
            write_array(file, np.moveaxis(film, -1, 1) if len(shape) == 3 else film)
        else:
            write_video(file, film) if ending == ".mkv" else write_pages(file, film)
    (tmp_path / "left" / "notes.txt").write_text("no film")
    data = Sequences(tmp_path, channels=3 if len(shape) == 3 else 1)
    assert data.flow_names == ("left", "right") and data.fixed_k.tolist() == [0, 0, 1]
    expected = torch.tensor(np.stack(list(films.values())))
    expected = expected.permute(0, 1, 4, 2, 3) if len(shape) == 3 else expected[:, :, None]
    assert torch.equal(data.frames, expected)
    layout = "t c h w" if ending.startswith(".n") and len(shape) == 3 else None
    alone = Sequences(tmp_path / "left" / f"b{ending}", channels=3 if len(shape) == 3 else 1, layout=layout)
    assert torch.equal(alone.frames, expected[1:2])
    listed = Sequences(
        [tmp_path / "right" / f"a{ending}", tmp_path / "left" / f"a{ending}"], channels=data.image_shape[0]
    )
    assert torch.equal(listed.frames, expected[[2, 0]])


def test_films_and_folders_of_pictures_lie_side_by_side(tmp_path: Path) -> None:
    write_pictures(tmp_path / "b", noise(4, 1))
    write_pages(tmp_path / "a.tif", noise(4, 0))
    write_array(tmp_path / "c.npy", noise(4, 2))
    assert torch.equal(Sequences(tmp_path).frames[:, :, 0], torch.tensor(np.stack([noise(4, n) for n in range(3)])))


def test_an_animation_with_transparent_parts_shows_the_background(tmp_path: Path) -> None:
    frames = np.full((3, 8, 12, 4), 200, np.uint8)
    frames[..., 3] = 255
    frames[:, :, :6, 3] = 0
    frames[1, :, :, :3] = 90
    write_pages(tmp_path / "a.webp", frames)
    made = Sequences(tmp_path, background="white").frames[0]
    assert made[..., :6].unique().tolist() == [255] and made[:, 0, 0, 8].tolist() == [200, 90, 200]


def test_a_long_recording_is_cut_into_windows(tmp_path: Path) -> None:
    first, second = noise(20, 0), noise(13, 1)
    write_array(tmp_path / "turn" / "a.npy", first)
    write_pictures(tmp_path / "turn" / "b", second)
    with pytest.raises(ValueError, match=r"b holds 13 frames, but .*a.npy 20: .* window="):
        Sequences(tmp_path)
    data = Sequences(tmp_path, window=6, stride=4)
    starts = [(first, 0), (first, 4), (first, 8), (first, 12), (second, 0), (second, 4)]
    expected = np.stack([film[start : start + 6] for film, start in starts])
    assert torch.equal(data.frames[:, :, 0], torch.tensor(expected)) and data.num_steps == 5
    assert data.groups == ("turn/a.npy",) * 4 + ("turn/b",) * 2 and data.fixed_k.tolist() == [0] * 6
    torch.testing.assert_close(data.batch([5, 1])["frames"][:, :, 0], torch.tensor(expected[[5, 1]]) / 255)
    part = data.subset([1, 4])
    assert torch.equal(part.frames[:, :, 0], torch.tensor(expected[[1, 4]])) and part.groups == ("turn/a.npy", "turn/b")
    assert torch.equal(part.subset([1]).frames[0, :, 0], torch.tensor(expected[4]))
    assert len(Sequences(tmp_path, window=6)) == 5
    with pytest.raises(ValueError, match="b holds 13 frames, fewer than a window of 14"):
        Sequences(tmp_path, window=14)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"window": 1}, ValueError, "window must be at least 2"),
        ({"window": 2.5}, TypeError, "window must be an integer"),
        ({"window": 2, "stride": 0}, ValueError, "stride must be at least 1"),
        ({"stride": 2}, ValueError, "give window="),
    ],
)
def test_windows_that_cannot_be_are_told(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Sequences(torch.zeros(2, 6, 4, 4), **settings)


def test_levels_and_groups_of_folders(tmp_path: Path) -> None:
    for name in ("left/ann/1", "left/bob/1", "right/ann/1", "right/bob/2"):
        write_array(tmp_path / "class" / f"{name}.npy", noise(3))
        label, person, clip = name.split("/")
        write_array(tmp_path / "group" / person / label / f"{clip}.npy", noise(3))
        write_array(tmp_path / "names" / label / f"{person}_{clip}.npy", noise(3))
        write_array(tmp_path / "plain" / person / f"{label}{clip}.npy", noise(3))
    data = Sequences(tmp_path / "class")
    assert data.flow_names == ("left", "right") and data.groups == ("ann", "bob", "ann", "bob")
    data = Sequences(tmp_path / "group", levels="group/class/sequence")
    assert data.fixed_k.tolist() == [0, 1, 0, 1] and data.groups == ("ann", "ann", "bob", "bob")
    for pattern in ("ann|bob", "/([a-z]+)_"):
        assert Sequences(tmp_path / "names", group=pattern).groups == ("ann", "bob", "ann", "bob")
    data = Sequences(tmp_path / "plain", levels="group/sequence")
    assert data.num_flows == 0 and data.groups == ("ann", "ann", "bob", "bob")
    assert Sequences(tmp_path / "plain").flow_names == ("ann", "bob")
    assert Sequences(tmp_path / "names", group=[1, 2, 3, 3]).groups == ("1", "2", "3", "3")
    with pytest.raises(ValueError, match=r"group='bob' matches nothing in 'left/ann_1.npy'"):
        Sequences(tmp_path / "names", group="bob")
    with pytest.raises(ValueError, match=r"not a regular expression"):
        Sequences(tmp_path / "names", group="(")
    with pytest.raises(ValueError, match="4 sequences, but 2 groups"):
        Sequences(tmp_path / "names", group=["a", "b"])
    with pytest.raises(ValueError, match="levels names the folders"):
        Sequences(tmp_path / "names", levels="class/film")
    with pytest.raises(ValueError, match=r"lie 2 down, such as left/ann_1.npy"):
        Sequences(tmp_path / "names", levels="class/group/sequence")
    with pytest.raises(ValueError, match="too far down"):
        Sequences(tmp_path)


def test_arrays_of_many_sequences_with_what_acts_in_them(tmp_path: Path) -> None:
    frames = noise(12, 0).reshape(4, 3, 8, 12)
    np.savez(tmp_path / "clips.npz", frames=frames, k=np.array([0, 1, 1, 0], dtype=">i2"), group=["a", "b", "a", "b"])
    data = Sequences(tmp_path / "clips.npz", flow_names=["left", "right"])
    assert data.fixed_k.tolist() == [0, 1, 1, 0] and data.groups == ("a", "b", "a", "b")
    assert torch.equal(data.frames[:, :, 0], torch.tensor(frames))
    for name in ("left", "right"):
        write_array(tmp_path / "root" / name / "clips.npy", np.swapaxes(frames, 0, 1))
    data = Sequences(tmp_path / "root", layout="t n h w")
    assert len(data) == 8 and len(set(data.groups)) == 2
    assert torch.equal(data.frames[4:, :, 0], torch.tensor(frames))
    with pytest.raises(
        ValueError, match=r"clips.npy: \[4, 3, 8, 12\] may be one film in 3 channels or .*: say layout="
    ):
        Sequences(write_array(tmp_path / "clips.npy", frames))


@VIDEO
def test_videos_of_phones_are_turned_upright(tmp_path: Path) -> None:
    import av

    film = np.zeros((4, 16, 32, 3), np.uint8)
    film[:, :8] = 255  # bright above
    write_video(tmp_path / "plain.mp4", film, codec="mpeg4")
    with av.open(str(tmp_path / "plain.mp4")) as source, av.open(str(tmp_path / "turned.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = bytearray((tmp_path / "turned.mp4").read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # of the matrix, after version, times, number, length and volume
    one = (1 << 16).to_bytes(4, "big")
    assert data[place : place + 4] == one
    # The matrix that a phone held upright writes: (0 1 0; -1 0 0; 0 0 1), a quarter turn clockwise.
    data[place : place + 20] = bytes(4) + one + bytes(4) + (2**32 - (1 << 16)).to_bytes(4, "big") + bytes(4)
    (tmp_path / "turned.mp4").write_bytes(data)
    plain = Sequences(tmp_path / "plain.mp4").frames[0, 0]
    turned = Sequences(tmp_path / "turned.mp4").frames[0, 0]
    assert plain.shape == (3, 16, 32) and turned.shape == (3, 32, 16)
    assert (
        plain[:, 2].float().mean() > 200 and turned[:, :, -2].float().mean() > 200 > 50 > turned[:, :, 2].float().mean()
    )


@VIDEO
def test_damaged_videos_are_told_by_name(tmp_path: Path) -> None:
    file = write_video(tmp_path / "root" / "a.mp4", noise(8, 0, (16, 16, 3)), codec="mpeg4")
    write_video(tmp_path / "root" / "b.mp4", noise(8, 1, (16, 16, 3)), codec="mpeg4")
    assert Sequences(tmp_path / "root").frames.shape == (2, 8, 3, 16, 16)
    whole = file.read_bytes()
    for damaged in (b"", b"no video", whole[:100], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.mp4 (cannot be read as a video|holds no)"):
            Sequences(tmp_path / "root")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("ending", [".npy", ".npz", ".gif", ".tif"])
def test_damaged_films_are_told_by_name(tmp_path: Path, ending: str) -> None:
    film = noise(4, 0, (16, 16))
    file = tmp_path / f"a{ending}"
    write_array(file, film) if ending.startswith(".n") else write_pages(file, film)
    whole, random = file.read_bytes(), np.random.default_rng(0)
    for attempt in range(60):
        damaged = bytearray(whole[: random.integers(len(whole))] if attempt % 2 else whole)
        for _ in range(3):
            if damaged:
                damaged[random.integers(min(len(damaged), 200))] = random.integers(256)
        file.write_bytes(damaged)
        try:
            Sequences(tmp_path)
        except (ValueError, TypeError) as error:
            assert str(file) in str(error) or "holds pictures, but no folders" in str(error), error


def test_arrays_that_are_no_films_are_told(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    for array, message in [
        (np.zeros((2, 3)), r"a.npy holds an array \[2, 3\]"),
        (np.zeros((0, 8, 8)), "a.npy holds no frames"),
        (np.full((3, 8, 8), 2.0), r"frames in .*a.npy must lie in \[0, 1\]"),
        (np.zeros((3, 28, 28, 1)), "a.npy: .* channels-last: .*layout='t h w c'"),
        (np.zeros((3, 8, 8), dtype=np.int32), "a.npy must be uint8"),
    ]:
        np.save(file, array)
        with pytest.raises(ValueError, match=message):
            Sequences(tmp_path)
    np.save(file, np.zeros((3, 28, 28, 1)))
    assert Sequences(tmp_path, layout="t h w c").image_shape == (1, 28, 28)
    file.rename(tmp_path / "kept")
    np.savez(tmp_path / "b.npz", one=np.zeros((3, 8, 8)), two=np.zeros(3))
    with pytest.raises(ValueError, match=r"b.npz holds 2 arrays \(one, two\), none of which is called 'frames'"):
        Sequences(tmp_path)


def test_files_that_may_not_be_read_keep_their_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none is not a folder"):
        Sequences(tmp_path / "none")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a.txt is no folder and no file of frames"):
        Sequences(tmp_path / "a.txt")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.npy").symlink_to(tmp_path / "gone.npy")
    with pytest.raises(FileNotFoundError, match=r"a.npy"):
        Sequences(tmp_path / "root")
