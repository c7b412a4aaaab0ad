"""Checks that several metrics share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowfactor.data import SequenceDataset
from flowfactor.data.starts import Direction, Start
from flowfactor.models.protocols import HasFlows


def check_flows(model: HasFlows, data: SequenceDataset) -> None:
    """Checks that a model has as many flows as a data set has transformations; raises ValueError."""
    if model.num_flows != data.num_flows:
        raise ValueError(f"the model has {model.num_flows} flows and the data set {data.num_flows} transformations")


def check_order(order: Any, count: int) -> Tensor:
    """Checks that an order names each of ``count`` flows once, or raises ValueError; returns it as indices ``[K]``."""
    order = torch.as_tensor(order).long()
    if sorted(order.flatten().tolist()) != list(range(count)):
        raise ValueError(f"order must name each of 0 to {count - 1} once, got {order.tolist()}")
    return order


def running_as(data: SequenceDataset, start: Start | None, direction: Direction | None, what: str) -> SequenceDataset:
    """A data set with its sequences begun and run as a figure is asked for; raises ValueError where it cannot tell them."""
    if start is None and direction is None:
        return data
    if not isinstance(data, SequenceDataset):
        raise ValueError(
            f"{what} takes start={start!r} and direction={direction!r} for a data set alone, which can tell what it would "
            "show: hand it one, such as MNIST or CombinedImages, or batches that begin and run so, without these"
        )
    if direction == "both":
        raise ValueError(f"{what} is of one direction: 'forward' or 'backward', got 'both'")
    return data.running(start=start, direction=direction)
