"""The resumable loader."""

from __future__ import annotations

import json
from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader

from flowfactor.data import Rotate, Scale, TransformedImages


@pytest.fixture
def data() -> TransformedImages:
    # Each image is one constant, so that a frame tells which image it shows.
    images = (torch.arange(24) / 24)[:, None, None].expand(24, 5, 5)
    return TransformedImages(images, {"turn": (Rotate(), 0, 10), "grow": (Scale(), 1, 1.2)}, steps=2)


def ids(batches) -> list[list[int]]:
    return [(batch["frames"][:, 0, 0, 2, 2] * 24).round().int().tolist() for batch in batches]


def test_epochs_differ_and_repeat_with_the_seed(data: TransformedImages) -> None:
    loader = data.loader(6, generator=torch.Generator().manual_seed(3))
    first, second = ids(loader), ids(loader)
    assert len(loader) == len(first) == 4
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(24))
    assert first != second
    again = data.loader(6, generator=torch.Generator().manual_seed(3))
    assert [ids(again), ids(again)] == [first, second]


def test_resume_in_the_middle_goes_on_with_the_same_batches(data: TransformedImages) -> None:
    loader = data.loader(6, generator=torch.Generator().manual_seed(3))
    list(loader)
    batches = iter(loader)
    next(batches), next(batches)
    state = json.loads(json.dumps(loader.state_dict()))
    rest = ids(batches) + ids(loader)
    other = data.loader(6)
    other.load_state_dict(state)
    assert ids(other) + ids(other) == rest
    assert len(rest) == 2 + 4


def test_resume_at_the_end_begins_the_next_epoch(data: TransformedImages) -> None:
    loader = data.loader(6, generator=torch.Generator().manual_seed(3))
    list(loader)
    other = data.loader(6)
    other.load_state_dict(loader.state_dict())
    assert ids(other) == ids(loader)


def test_an_epoch_that_is_broken_off_is_not_repeated(data: TransformedImages) -> None:
    loader = data.loader(6, generator=torch.Generator().manual_seed(3))
    old = iter(loader)
    first = ids([next(old)])
    second = ids(loader)
    next(old)
    assert first[0] != second[0]
    assert loader.state_dict()["epoch"] == 1
    assert loader.state_dict()["batch"] == 4


def test_a_fresh_state_can_be_loaded(data: TransformedImages) -> None:
    loader, other = (data.loader(6, generator=torch.Generator().manual_seed(s)) for s in (3, 4))
    other.load_state_dict(loader.state_dict())
    assert ids(other) == ids(loader)


def test_processes_share_the_batches(data: TransformedImages) -> None:
    whole = ids(data.loader(4, generator=torch.Generator().manual_seed(3)))
    parts = [ids(data.loader(4, generator=torch.Generator().manual_seed(3), rank=r, world_size=4)) for r in range(4)]
    assert [len(part) for part in parts] == [1, 1, 1, 1]
    assert list(chain(*parts)) == whole[:4]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_epochs_count_wherever_batches_are_made(data: TransformedImages, workers: int, persistent: bool) -> None:
    loader, alone = (data.loader(6, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    made = loader.dataloader(num_workers=workers, persistent_workers=persistent)
    assert len(made) == 4
    for _ in range(3):
        assert ids(made) == ids(alone)
        assert loader.state_dict() == alone.state_dict()
    part, own = iter(made), iter(alone)
    assert ids([next(part)]) == ids([next(own)])
    state = loader.state_dict()  # workers are ahead of it
    assert state == alone.state_dict()
    rest = ids(own)
    del part
    other = data.loader(6)
    other.load_state_dict(state)
    resumed = other.dataloader(num_workers=workers, persistent_workers=persistent)
    assert [ids(resumed), ids(resumed)] == [rest, ids(alone)]


def test_workers_that_would_repeat_an_epoch_are_refused(data: TransformedImages) -> None:
    loader = data.loader(6)
    assert ids(DataLoader(loader, batch_size=None)) != ids(DataLoader(loader, batch_size=None))
    with pytest.raises(RuntimeError, match=r"loader\.dataloader\(num_workers=n\)"):
        list(DataLoader(loader, batch_size=None, num_workers=2))
    with pytest.raises(ValueError, match="shuffle cannot be given"):
        loader.dataloader(shuffle=True)


def test_what_is_refused(data: TransformedImages) -> None:
    with pytest.raises(ValueError, match="rank"):
        data.loader(6, rank=2, world_size=2)
    with pytest.raises(ValueError, match="one batch of 20 for each of 2 processes"):
        data.loader(20, rank=0, world_size=2)
    loader = data.loader(6)
    with pytest.raises(ValueError, match="batch_size 6, this one has 8"):
        data.loader(8).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="lacks"):
        loader.load_state_dict({"epoch": 1})
