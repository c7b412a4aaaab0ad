"""Files of models: what is not ours is not replaced, and what is damaged is told with the file's name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowfactor.models import build_model, load_pretrained
from flowfactor.models._saved import read_weights


def saved(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    return build_model("ours", (1, 8, 8), 2, 4, hidden=(8, 8), **options).save_pretrained(folder)


@pytest.mark.parametrize("names", [["config.json"], ["model.safetensors"], ["config.json", "model.safetensors"]])
def test_files_of_the_users_are_not_replaced_by_a_model(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match=r"holds .*which no model of flowfactor wrote: choose another directory"):
        saved(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, '{"mine": 1}')


def test_a_model_replaces_one_of_before(tmp_path: Path) -> None:
    saved(tmp_path)
    other = build_model("vae", (1, 8, 8), 2, 4)
    other.save_pretrained(tmp_path)
    assert type(load_pretrained(tmp_path)).__name__ == type(other).__name__


def _set(config: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    for name in way:
        config = config[name]
    config[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model", ["FlowFactorizedVAE"]),
        ("parts", None),
        ("settings", [1]),
        ("parts.encoder", {"type": "encoders.ConvEncoder"}),
        ("parts.encoder", "text"),
        ("parts.encoder.arguments", {"colour": 3}),
        ("parts.encoder.arguments.latent_dim", "four"),
        ("parts.flow", {"field": {}}),
        ("parts.prior", 5),
        ("settings.frames_per_step", "many"),
        ("settings.unknown", 1),
        ("parts.encoder.arguments.latent_dim", 10**14),
        ("parts.decoder.arguments.latent_dim", 10**12),
    ],
)
def test_a_config_that_describes_no_model_is_told(tmp_path: Path, path: str, value: Any) -> None:
    config = json.loads((saved(tmp_path) / "config.json").read_text())
    _set(config, path, value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"(config\.json|model\.safetensors)") as told:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(told.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 100_000, b'{"model": 1}', b"null"])
def test_a_config_that_is_no_json_object_of_a_model_is_told(tmp_path: Path, content: bytes) -> None:
    (saved(tmp_path) / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_pretrained(tmp_path)


def test_every_flipped_bit_of_the_weights_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path) / "model.safetensors"
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    digest = whole.index(b"flowfactor.sha256")
    places = torch.randint(8 * len(whole), (300,), generator=generator).tolist()
    places += torch.randint(8 * header, (300,), generator=generator).tolist()
    for place in [*places, *range(8 * digest, 8 * (digest + 84))]:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(damaged))
        with pytest.raises(ValueError) as told:
            read_weights(path, is_sealed=True)
        assert str(path) in str(told.value)
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors .* is not a whole safetensors file"):
        load_pretrained(tmp_path)


def unsealed(folder: Path) -> Path:
    """A model as earlier releases saved it: without a digest."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "digest"}))
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
    return folder


def test_weights_without_the_digest_that_their_config_tells_of_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path) / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, or none that save_pretrained wrote"):
        load_pretrained(tmp_path)
    assert load_pretrained(unsealed(tmp_path)).num_flows == 2


def test_a_model_saved_twice_is_the_same_files(tmp_path: Path) -> None:
    names = ("config.json", "model.safetensors")
    made = {tuple((saved(tmp_path / str(n)) / name).read_bytes() for name in names) for n in range(8)}
    assert len(made) == 1


def test_weights_of_another_kind_of_number_are_told(tmp_path: Path) -> None:
    path = unsealed(saved(tmp_path)) / "model.safetensors"
    state = load_file(path)
    name = next(name for name, value in state.items() if value.is_floating_point())
    save_file(state | {name: state[name].to(torch.int32)}, path)
    with pytest.raises(ValueError, match=r"is torch.int32, where the model has torch.float32"):
        load_pretrained(tmp_path)


def test_weights_that_are_nan_are_warned_of(tmp_path: Path) -> None:
    path = unsealed(saved(tmp_path)) / "model.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_pretrained(tmp_path)
    name, value = next(iter(model.named_parameters()))
    save_file(load_file(path) | {name: torch.full_like(value.data, torch.nan)}, path)
    with pytest.warns(UserWarning, match=rf"model\.safetensors holds weights that are NaN or infinite \({name}"):
        load_pretrained(tmp_path)


def test_a_pseudo_input_prior_is_saved_and_loaded(tmp_path: Path) -> None:
    assert load_pretrained(saved(tmp_path, prior="vamp", augment_dim=0)).prior.config["name"] == "vamp"
