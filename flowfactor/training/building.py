"""The model of a run."""

from __future__ import annotations

from typing import Any

import torch

from flowfactor.data import SequenceDataset
from flowfactor.models import METHODS, build_model, get_method
from flowfactor.training.config import Config
from flowfactor.training.signatures import model_settings


def make_model(config: Config, data: SequenceDataset) -> Any:
    """Builds the model of a configuration for the data that it is to be trained on.

    Seeds PyTorch's global generator with the configuration's seed.

    Args:
        config: The settings.
        data: The training split, which gives the picture's shape and the numbers of transformations and frames; where it
            has no labels, the number of flows is a setting of the model.

    Returns:
        The model.

    Raises:
        ValueError: If the method is unknown, a setting is out of range, sizes or transformations are not the data's, or the
            data have no labels and the method needs them.
        TypeError: If the model takes no such setting.
    """
    shape = {"image_shape": tuple(data.image_shape), "num_flows": data.num_flows, "num_frames": data.num_steps + 1}
    if not data.num_flows:  # without labels, the settings of the model alone say how many flows it has
        _check_needs_no_labels(config)
        del shape["num_flows"]
    settings = dict(config.model)
    for name, value in shape.items():
        given = settings.pop(name, value)
        if (tuple(given) if isinstance(given, list) else given) != value:
            raise ValueError(
                f"model.{name} is {given}, but the data set {config.data.name} has {value} (transformations: "
                f"{', '.join(data.flow_names)}): leave it out, or choose others by data.flows and data.steps"
            )
    fixed = data.fixed_k
    if (
        data.num_flows
        and fixed is not None
        and bool((fixed < 0).any())
        and get_method(config.method).labels != "inferred"
    ):
        given = [name for name, method in METHODS.items() if method.labels == "inferred"]
        raise ValueError(
            f"in the sequences of {config.data.name} no single transformation acts, so there is no k to give to the "
            f"method {config.method!r}: train by one that infers what acts ({', '.join(given)})"
        )
    _settle_context(config, data, settings)
    _settle_turning(config, data, settings)
    torch.manual_seed(config.seed)
    return build_model(config.method, **shape, **settings)


def _settle_context(config: Config, data: SequenceDataset, settings: dict[str, Any]) -> None:
    """Has the model take the context that the data have, or refuses where it cannot."""
    size = data.context_size
    given = settings.get("context", size)
    if given != size:
        raise ValueError(
            f"model.context is {given}, but the sequences of {config.data.name} have a context of {size or 'no'} features: "
            "leave it out, or give such data"
        )
    if not size:
        return
    if "context" not in model_settings(config.method):
        able = [name for name in METHODS if "context" in model_settings(name)]
        raise ValueError(
            f"the sequences of {config.data.name} have a context of {size} features, which the method {config.method!r} "
            f"cannot take: train by --method {', '.join(able)}, or leave the context out of the data"
        )
    settings["context"] = size


def _settle_turning(config: Config, data: SequenceDataset, settings: dict[str, Any]) -> None:
    """Has names of transformations in ``model.turning`` be the indices of their flows, or refuses where it cannot."""
    turning: Any = settings.get("turning")
    known = list(data.flow_names)
    names = [flow for flow in turning if isinstance(flow, str)] if isinstance(turning, list | tuple) else []
    if not names:
        return
    if get_method(config.method).labels != "given":
        raise ValueError(
            f"model.turning names {', '.join(names)}, but which of its flows becomes which transformation the method "
            f"{config.method!r} has to find out: give indices, such as [1, 2], or leave it out"
        )
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"model.turning names {', '.join(unknown)}, and the transformations of {config.data.name} are {', '.join(known)}"
        )
    settings["turning"] = [known.index(flow) if isinstance(flow, str) else flow for flow in turning]


def _check_needs_no_labels(config: Config) -> None:
    if get_method(config.method).labels == "given":
        without = [name for name, method in METHODS.items() if method.labels != "given"]
        raise ValueError(
            f"the sequences in {config.data.root} have no labels of what acts in them, which the method {config.method!r} "
            f"needs: sort them into folders <class>/<sequence>, or train by --method {', '.join(without)}"
        )
