"""Saving models as config.json and model.safetensors, and loading them again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from flowfactor._config import describe, rebuild, solver_config
from flowfactor.errors import require
from flowfactor.latent_flow import LatentFlow
from flowfactor.priors import build as build_prior
from flowfactor.solver import Solver

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_SETTINGS = ("objective", "kl_weight", "hj_weight", "start_weight", "frames_per_step")


class PretrainedMixin:
    """Gives a flow-factorized model `save_pretrained` and `from_pretrained`."""

    def config(self) -> dict[str, Any]:
        """How the model was made, as JSON values; parts of the user's own appear as None."""
        model: Any = self
        flow = {"field": describe(model.flow.field), "solver": solver_config(model.flow.solver)}
        prior = model.prior.config if _is_own(model.prior) else None
        force = model.force
        written = {
            "model": type(self).__name__,
            "parts": {
                "encoder": describe(model.encoder),
                "decoder": describe(model.decoder),
                "flow": flow | {"divergence": model.flow.divergence},
                "prior": prior,
                "force": "none" if force is None else describe(force),
            },
            "settings": {name: getattr(model, name) for name in _SETTINGS},
        }
        if getattr(model, "factor_encoder", None) is not None:
            written["parts"]["factor_encoder"] = describe(model.factor_encoder)
            written["settings"] |= {"factor_prior": model.factor_prior, "estimator": model.estimator.config}
        return written

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Writes ``config.json`` and ``model.safetensors`` into a directory, each whole or not at all.

        Args:
            directory: Made where it is missing.

        Returns:
            The directory.

        Raises:
            ImportError: If safetensors is not installed.
        """
        safetensors = require("safetensors.torch", extra="io")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        assert isinstance(self, nn.Module)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        weights = directory / f".{WEIGHTS}.{os.getpid()}"
        safetensors.save_file(state, weights, metadata={"format": "pt"})
        text = directory / f".{CONFIG}.{os.getpid()}"
        text.write_text(json.dumps(self.config(), indent=2) + "\n", encoding="utf-8")
        weights.replace(directory / WEIGHTS)
        text.replace(directory / CONFIG)
        return directory

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **parts: Any) -> Any:
        """Loads a model that `save_pretrained` wrote.

        Only classes of flowfactor are made from the file; it cannot name code to import.

        Args:
            directory: Where the two files lie.
            **parts: Parts of your own (``encoder``, ``decoder``, ``flow``, ``prior``, ``force``, ``factor_encoder``), made
                as they were when the model was saved; their weights are loaded.

        Returns:
            The model, in evaluation mode.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, of another model, or a part of one's own is not handed over.
        """
        safetensors = require("safetensors.torch", extra="io")
        directory = Path(directory)
        for name in (CONFIG, WEIGHTS):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"{directory} holds no {name}; it is written by model.save_pretrained(directory)"
                )
        try:
            config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{directory / CONFIG} is not valid JSON: {error}") from error
        if not isinstance(config, dict) or config.get("model") != cls.__name__:
            found = config.get("model") if isinstance(config, dict) else None
            raise ValueError(f"{directory} holds a {found}, not a {cls.__name__}")
        model = cls._assemble(config, parts)
        damaged: type[Exception] = require("safetensors", extra="io").SafetensorError
        try:
            state = safetensors.load_file(directory / WEIGHTS)
            assert isinstance(model, nn.Module)
            model.load_state_dict(state)
        except (RuntimeError, damaged) as error:
            raise ValueError(f"{directory / WEIGHTS} does not fit the model of its config: {error}") from error
        return model.eval()

    @classmethod
    def _assemble(cls, config: dict[str, Any], given: dict[str, Any]) -> Any:
        """Makes the model of a config, with fresh weights; models with other parts give their own."""
        return cls(**_parts(config["parts"], given), **config["settings"])


def _parts(written: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    unknown = set(given) - set(written)
    if unknown:
        raise ValueError(f"a model has no parts {sorted(unknown)}; it has {sorted(written)}")
    made = dict(given)
    for name in ("encoder", "decoder", "factor_encoder"):
        if name in written and name not in made:
            made[name] = rebuild(_present(name, written[name]))
    if "flow" not in made:
        flow = written["flow"]
        field: Any = rebuild(_present("flow", flow["field"]))
        made["flow"] = LatentFlow(field, Solver(**flow["solver"]), flow["divergence"])
    if "prior" not in made:
        made["prior"] = build_prior(_present("prior", written["prior"]), made["encoder"])
    if "force" not in made:
        made["force"] = None if written["force"] == "none" else rebuild(_present("force", written["force"]))
    return made


def _present(name: str, config: dict[str, Any] | None) -> dict[str, Any]:
    if config is None:
        raise ValueError(
            f"this model's {name} is a part of the user's own: hand it over as from_pretrained(directory, {name}=...)"
        )
    return config


def _is_own(prior: Any) -> bool:
    return type(prior).__module__.startswith("flowfactor.priors")
