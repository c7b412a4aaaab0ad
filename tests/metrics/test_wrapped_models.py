"""Models that wrap another: they can be copied, and are measured in evaluation mode like any other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import flowfactor as ff
from flowfactor._evaluating import evaluating


def model() -> ff.models.FlowFactorizedVAE:
    return ff.models.build_vae((1, 8, 8), 2, 4, hidden=(8, 8)).train()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_matched_models_can_be_copied(copied) -> None:
    matched = ff.metrics.MatchedModel(model(), torch.tensor([1, 0]))
    twin = copied(matched)
    assert torch.equal(twin.order, matched.order) and twin.num_flows == 2 and twin.model is not matched.model


@pytest.mark.parametrize("kind", ["matched", "traversal", "both"])
def test_the_wrapped_model_is_evaluated(kind: str) -> None:
    inner = model()
    wrapped: object = inner
    if kind != "matched":
        wrapped = ff.metrics.TraversalModel(wrapped, [ff.metrics.Traversal(0, 1.0), ff.metrics.Traversal(1, 1.0)], 2.0)
    if kind != "traversal":
        wrapped = ff.metrics.MatchedModel(wrapped, torch.tensor([1, 0]))
    with evaluating(wrapped):
        assert not any(part.training for part in inner.modules())
    assert all(part.training for part in inner.modules())
