r"""The tape of a potential $\phi = \tanh(v + b_3)$ round a two-layer network v: the paper's.

With $f', f'', f^{(3)}$ the derivatives of tanh at $v + b_3$ and e Hutchinson's probe,
$$\nabla\phi = f'\,\nabla v, \qquad \dot\phi = f'\,\dot v, \qquad
  e^\top \mathrm{Hess}\,\phi\,e = f'\, e^\top \mathrm{Hess}\,v\,e + f''\,(e\cdot\nabla v)^2 ,$$
so that cotangents $\bar u, \lambda, \tau, \mu$ of value, gradient, time derivative and Laplacian become cotangents
$f'\lambda + 2\mu f''(e\cdot\nabla v)\,e$, $f'\tau$ and $f'\mu$ of those of v, and
$$\bar v = f'\bar u + f''(\lambda\cdot\nabla v + \tau\dot v + \mu\,e^\top\mathrm{Hess}\,v\,e)
  + \mu f^{(3)}(e\cdot\nabla v)^2 .$$
With the exact Laplacian $(e\cdot\nabla v)\,e$ is $\nabla v$ and $(e\cdot\nabla v)^2$ is $|\nabla v|^2$.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowfactor.networks.activations import one_minus_square
from flowfactor.networks.batched import Products
from flowfactor.networks.two_layer_adjoint import Stages, TwoLayerTape


class OuterTanhTape(TwoLayerTape):
    """See `TwoLayerTape`; ``stack`` holds ``b3`` as well."""

    def gradient(
        self, z: Tensor, terms: tuple[Tensor, Tensor], record: bool, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        inner, found = super().gradient(z, terms, False)
        h2 = found[4]  # of tanh the base is the value
        phi = torch.tanh(torch.bmm(h2, self.w3.mT) + self.p["b3"].unsqueeze(-1))  # [K, n, 1]
        found = (*found, inner, phi)
        if record:
            self.records.append(found)
        return torch.mul(one_minus_square(phi), inner, out=out), found

    def laplacians(self, found: Sequence[tuple[Tensor, ...]]) -> Tensor:
        inner = super().laplacians(found)
        g, phi = (torch.stack(x, 1) for x in zip(*(f[7:] for f in found), strict=True))
        first = one_minus_square(phi)
        return self._outer_laplacian(inner, self._along(g), first, -2 * phi * first)

    def _along(self, g: Tensor) -> Tensor:
        """``(e . g)^2``, or ``|g|^2`` for the exact Laplacian, ``[K, S, n, 1]``."""
        if self.laplacian == "exact":
            return g.square().sum(-1, keepdim=True)
        assert self.probe is not None
        return (g * self.probe.unsqueeze(1)).sum(-1, keepdim=True).square()

    @staticmethod
    def _outer_laplacian(inner: Tensor, along: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return (first * inner.unsqueeze(-1) + second * along).squeeze(-1)

    def take(self, ts: list[float]) -> None:
        records = self.records
        self.g, self.phi = (torch.stack(x, 1) for x in zip(*(r[7:] for r in records), strict=True))
        self.records = [r[:7] for r in records]
        super().take(ts)
        self.records = records[-1:]
        self.first = one_minus_square(self.phi)
        self.second = -2 * self.phi * self.first
        self._inner: dict[str, Tensor] = {}

    def _of_inner(self, name: str) -> Tensor:
        """Time derivative or Laplacian of v at all stages, ``[K, S, n]``, worked out once."""
        if name not in self._inner:
            self._inner |= super().outputs(frozenset({name}))
        return self._inner[name]

    def plain_gradient(self) -> Tensor:
        return self.first * super().plain_gradient()

    def outputs(self, want: frozenset[str]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if "value" in want:
            out["value"] = self.phi.squeeze(-1)
        if "gradient" in want:
            out["gradient"] = self.first * self.g
        if "time" in want:
            out["time"] = self.first.squeeze(-1) * self._of_inner("time")
        if "laplacian" in want:
            out["laplacian"] = self._outer_laplacian(
                self._of_inner("laplacian"), self._along(self.g), self.first, self.second
            )
        return out

    def begin(self, cotangents: dict[str, Tensor], *, weights: bool = True) -> Tensor | None:
        first, second = self.first.squeeze(-1), self.second.squeeze(-1)
        value = torch.zeros_like(first)
        inner: dict[str, Tensor] = {}
        if "value" in cotangents:
            value += first * cotangents["value"]
        if "time" in cotangents:
            inner["time"] = first * cotangents["time"]
            value += second * cotangents["time"] * self._of_inner("time")
        if "laplacian" in cotangents:
            mu = cotangents["laplacian"]
            inner["laplacian"] = first * mu
            third = first * (4 * self.phi.squeeze(-1).square() - 2 * first)
            value += mu * (second * self._of_inner("laplacian") + third * self._along(self.g).squeeze(-1))
            outer = (2 * mu * second).unsqueeze(-1)
            if self.laplacian == "exact":
                inner["gradient"] = outer * self.g
            else:
                assert self.probe is not None
                probe = self.probe.unsqueeze(1)
                inner["gradient"] = outer * (self.g * probe).sum(-1, keepdim=True) * probe
        self.of_gradient = cotangents.get("gradient")
        self.of_value = value.unsqueeze(-1)  # what pulls do not add
        self.value_bar = torch.zeros_like(self.of_value)
        return super().begin(inner, weights=weights)

    def pull(self, at: Stages, lam: Tensor, value: Tensor | None = None) -> Tensor:
        if self.of_gradient is not None:
            lam = lam + self.of_gradient[at]
        value_bar = self.of_value[at] + self.second[at] * (lam * self.g[at]).sum(-1, keepdim=True)
        self.value_bar[at] = value_bar
        return super().pull(at, self.first[at] * lam, value_bar)

    def gradients(self) -> Products:
        out = super().gradients()
        out["w3"] = out["w3"] + (self.value_bar * self._h2()).sum((1, 2)).unsqueeze(-2)
        out["b3"] = self.value_bar.sum((1, 2))
        return out
