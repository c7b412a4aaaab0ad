"""What the readers of published data sets share: a grid of factors whose pictures lie in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfactor.data.checks import to_unit
from flowfactor.data.factors import FactorSequences
from flowfactor.data.readers.image_stores import ImageStore, copied, grid_rows


class StoredFactors(FactorSequences):
    """A `FactorSequences` whose pictures are read from files, as bytes, when a batch asks for them."""

    _store: ImageStore
    _rows: Tensor

    def _set_up(
        self,
        store: ImageStore,
        labels: np.ndarray,
        names: Sequence[str],
        source: str | Path,
        *,
        cache: str | Path | None = None,
        **settings: Any,
    ) -> None:
        """Checks that labels [N, F] and pictures belong together, and lays out the grid with `_lay_out`'s settings."""
        if labels.ndim != 2 or labels.shape[1] != len(names):
            raise ValueError(
                f"{source} has labels {list(labels.shape)}, expected [N, {len(names)}]: {', '.join(names)}"
            )
        if len(labels) != store.shape[0]:
            raise ValueError(f"{source} holds {store.shape[0]:,} pictures, but {len(labels):,} labels")
        values, self._rows = grid_rows(labels, str(source))
        self._lay_out(names, values, **settings)
        self._store = store if cache is None else copied(store, cache)
        channels, height, width = store.shape[1:]
        self.image_shape = (channels, height, width)

    def images_at(self, states: Tensor) -> Tensor:
        """Reads the pictures [*batch, C, H, W] of scenes, float32 in [0, 1], from their states [*batch, F]."""
        flat = states.reshape(-1, states.shape[-1]).cpu()
        place = torch.zeros(len(flat), dtype=torch.long)
        for factor, size in enumerate(self.factor_sizes):
            place = place * size + flat[:, factor]
        pictures = to_unit(self._store.read(self._rows[place]).to(self.t.device))
        return pictures.view(*states.shape[:-1], *self.image_shape)
