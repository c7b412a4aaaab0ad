r"""Closed-form derivatives of a scalar network with two hidden layers, for K networks at once.

With $a_1 = W_1 z + c_1(t)$, $h_1 = \sigma(a_1)$, $a_2 = W_2 h_1 + U z + c_2(t)$, $h_2 = \sigma(a_2)$ and
$$u = w_3 \cdot h_2 + \tfrac12 \sum_r s_r (A_r \cdot z)^2 + b \cdot z ,$$
write $\delta_2 = w_3\,\sigma'(a_2)$, $g_1 = W_2^\top \delta_2$, $\delta_1 = g_1\,\sigma'(a_1)$. Then
$$\nabla u = W_1^\top \delta_1 + U^\top \delta_2 + A^\top (s\, A z) + b, \qquad
  \partial_t u = \delta_1 \cdot \dot c_1 + \delta_2 \cdot \dot c_2 ,$$
$$\Delta u = \sum_i g_{1i}\,\sigma''(a_{1i}) |W_{1i}|^2 + \sum_k w_{3k}\,\sigma''(a_{2k}) |J_k|^2 + \sum_r s_r |A_r|^2 ,
  \qquad J = W_2\,\mathrm{diag}(\sigma'(a_1))\,W_1 + U .$$
The sum over $|J_k|^2$ is the costly one (`flowfactor.networks.row_norms`); no second backward pass is run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowfactor.networks.activations import Activation
from flowfactor.networks.batching import Stack
from flowfactor.networks.probes import Probes
from flowfactor.networks.row_norms import weighted_row_norms
from flowfactor.networks.time import TimeFeatures


def two_layer(
    p: Stack,
    activation: Activation,
    features: TimeFeatures,
    want: frozenset[str],
    laplacian: str | None,
    probe: Tensor | None,
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """Binds one stack of networks; ``c_i(t)`` are the linear maps ``v_i`` of the time features plus ``b_i``."""
    return two_layer_with_terms(
        p, activation, lambda t: time_terms(p, features, t, "time" in want), want, laplacian, probe
    )


def time_terms(
    p: Stack, features: TimeFeatures, t: Tensor, derivative: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """``c1, dc1/dt, c2, dc2/dt`` as linear maps of the time features; derivatives where asked for, else None.

    Without time features, what is left are the biases, whose derivatives are None: zero.
    """
    if "v1" not in p:
        return p["b1"], None, p["b2"], None
    f, df = features(t, derivative=derivative)
    c1, c2 = f @ p["v1"].mT + p["b1"], f @ p["v2"].mT + p["b2"]
    return c1, None if df is None else df @ p["v1"].mT, c2, None if df is None else df @ p["v2"].mT


def two_layer_with_terms(
    p: Stack,
    activation: Activation,
    time_terms: Callable[[Tensor], tuple[Tensor, Tensor | None, Tensor, Tensor | None]],
    want: frozenset[str],
    laplacian: str | None,
    probe: Tensor | None,
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """Binds one stack of networks whose time terms ``c1, dc1/dt, c2, dc2/dt`` the caller supplies; None is zero."""
    w1, w2, w3 = p["w1"], p["w2"], p["w3"]
    w1_t, w2_t = w1.mT, w2.mT
    skip = p.get("skip")
    curvature = _curvature(p, laplacian, probe) if "laplacian" in want else None

    def evaluate(z: Tensor, t: Tensor) -> dict[str, Tensor]:
        c1, c1_dot, c2, c2_dot = time_terms(t)
        h1, s1, s1_prime = activation(z @ w1_t + c1)
        a2 = h1() @ w2_t + c2
        if skip is not None:
            a2 = a2 + z @ skip.mT
        h2, s2, s2_prime = activation(a2)
        delta2 = w3 * s2
        g1 = delta2 @ w2
        delta1 = g1 * s1
        out: dict[str, Tensor] = {}
        quad = z @ p["quad"].mT if "quad" in p else None
        if "value" in want:
            value = (h2() * w3).sum(-1)
            if quad is not None:
                value = value + 0.5 * (p["scale"] * quad * quad).sum(-1) + (z * p["linear"]).sum(-1)
            out["value"] = value
        if "gradient" in want:
            gradient = delta1 @ w1
            if skip is not None:
                gradient = gradient + delta2 @ skip
            if quad is not None:
                gradient = gradient + (p["scale"] * quad) @ p["quad"] + p["linear"]
            out["gradient"] = gradient
        if "time" in want:
            out["time"] = torch.zeros_like(g1[..., 0]) if c2_dot is None else (delta2 * c2_dot).sum(-1)
            if c1_dot is not None:
                out["time"] = out["time"] + (delta1 * c1_dot).sum(-1)
        if curvature is not None:
            out["laplacian"] = curvature(s1, g1 * s1_prime(), w3 * s2_prime())
        return out

    return evaluate


def _curvature(p: Stack, laplacian: str | None, probe: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The Laplacian from ``s'(a1)``, ``g1 s''(a1)`` and ``w3 s''(a2)``: exact, or along fixed probes."""
    w1, w2, skip = p["w1"], p["w2"], p.get("skip")
    if laplacian == "hutchinson":
        assert probe is not None
        probes = Probes(probe, w1.shape[-1])
        along1 = probes.product(probes.e, w1.mT)  # the probe is fixed for a whole solve, and so is this
        squared1 = probes.mean(along1 * along1)
        along_skip = None if skip is None else probes.product(probes.e, skip.mT)
        fixed = None
        if "quad" in p:
            fixed = (p["scale"] * probes.mean(probes.product(probes.e, p["quad"].mT).square())).sum(-1)

        def estimate(s1: Tensor, m1: Tensor, m2: Tensor) -> Tensor:
            along2 = probes.product(probes.spread(s1) * along1, w2.mT)
            if along_skip is not None:
                along2 = along2 + along_skip
            total = (m1 * squared1).sum(-1) + (m2 * probes.mean(along2 * along2)).sum(-1)
            return total if fixed is None else total + fixed

        return estimate

    norms1 = w1.square().sum(-1).unsqueeze(-2)
    rows = weighted_row_norms(w2, w1)
    constant = (p["scale"] * p["quad"].square().sum(-1).unsqueeze(-2)).sum(-1) if "quad" in p else None
    cross = None if skip is None else w2 * (skip @ w1.mT)
    norms_skip = None if skip is None else skip.square().sum(-1).unsqueeze(-2)

    def exact(s1: Tensor, m1: Tensor, m2: Tensor) -> Tensor:
        total = (m1 * norms1).sum(-1) + rows(s1, m2)
        if cross is not None and norms_skip is not None:
            total = total + 2 * ((m2 @ cross) * s1).sum(-1) + (m2 * norms_skip).sum(-1)
        return total if constant is None else total + constant

    return exact
