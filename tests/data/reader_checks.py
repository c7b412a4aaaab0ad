"""What the tests of all readers of published data sets check."""

from __future__ import annotations

import torch

from flowfactor.data.factors import FactorSequences


def check_sequences(data: FactorSequences, shown) -> None:
    """Every frame is the picture of the states that the sequence says, in whatever order frames are asked for."""
    generator = torch.Generator().manual_seed(1)
    indices = torch.randint(len(data), (12,), generator=generator)
    k = torch.arange(12) % data.num_flows
    batch = data.batch(indices, k)
    states = data.states(indices, k)
    assert batch["frames"].shape == (12, len(data.t), *data.image_shape)
    assert batch["frames"].dtype == torch.float32
    torch.testing.assert_close(batch["frames"], shown(states))
    torch.testing.assert_close(batch["factors"], data.factors(states).float())
    for n, flow in enumerate(k.tolist()):
        moved = states[n].diff(dim=0).abs().sum(0).nonzero().flatten().tolist()
        assert [data.factor_names[f] for f in moved] == [data.flow_names[flow]]
    images, labels = data.factor_samples(30, generator)
    torch.testing.assert_close(images, shown(labels))
    assert bool((labels < torch.tensor(data.factor_sizes)).all())
    assert data.batch([], 0)["frames"].shape == (0, len(data.t), *data.image_shape)


def check_splits(make) -> None:
    states = {}
    for split in ("train", "test", "all"):
        data = make(split)
        every = torch.arange(len(data))
        rows = torch.cat([data.states(every, torch.full_like(every, k)).flatten(0, 1) for k in range(data.num_flows)])
        states[split] = {tuple(value) for value in data.factors(rows).tolist()}
    assert states["train"]
    assert states["test"]
    assert not states["train"] & states["test"]
    assert states["train"] | states["test"] == states["all"]
