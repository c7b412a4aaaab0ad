"""Checks of objectives and of estimators of the expectation over q(k|x)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from flowfactor.control import Control
from flowfactor.latent_flow import LatentFlow
from flowfactor.models import FactorBatch, FactorEstimator, SequenceTerms
from flowfactor.objectives import NoImportanceWeightsError, Objective
from flowfactor.potentials import MLPPotential
from flowfactor.priors import Diffusion, GaussianMixture
from flowfactor.solver import Solver
from flowfactor.testing.contract import STEP, Contract, check_module, quiet

_DIM, _FLOWS, _DRAWS = 2, 2, 400


def check_objective(o: Objective, *, without: Iterable[str] = ()) -> None:
    r"""Checks that an objective keeps what models rely on, on paths of a small flow and a prior that diffuses.

    Shapes under every kind of control, each path as by itself, the gradient in the posterior's means against central
    differences, copies, JSON values in ``config``; and, where it has importance weights, their shape and
    $E \ln w = E\,[\sum_t \ln p(x_t|z_t)] - E\,[\mathrm{divergence}]$, within six standard errors.

    Args:
        o: The objective.
        without: Names of `PROMISES` that it is excused from.

    Raises:
        ContractError: If a promise is broken.
        TypeError: If ``o`` is no objective.
        ValueError: If ``without`` names no promise.

    Example:
        >>> import flowfactor as ff
        >>> ff.testing.check_objective(ff.objectives.MarginalBound())
    """
    if not isinstance(o, Objective):
        raise TypeError(f"check_objective takes a flowfactor.objectives.Objective, got {type(o).__name__}")
    contract = Contract(o, without)
    t = torch.arange(3.0, dtype=torch.float64, device="cpu")
    mean, noise = contract.randn(4, _DIM, like=t), contract.randn(4, _DIM, like=t)
    with torch.random.fork_rng([]), torch.device("cpu"):
        flow = LatentFlow(MLPPotential(_DIM, _FLOWS, (4, 4), init_scale=1.0).double(), Solver("rk4", step_size=0.5))
        prior = Diffusion(GaussianMixture(_DIM, components=3), _FLOWS, init=0.2).double()

    def divergence(o: Objective, mean: Tensor, noise: Tensor, control: Control) -> Tensor:
        q = Independent(Normal(mean, torch.full_like(mean, 0.5)), 1)
        z0 = mean + 0.5 * noise
        start = o.begin(q, prior, z0, control)
        contract.tensor("begin gives a number of each sequence", start, z0.shape[:-1], z0)
        found = o.divergence(start, prior, flow(z0, t, control, log_det=o.log_det), t, control)
        contract.tensor("divergence gives a number of each path", found, z0.shape[:-1], z0)
        return found

    weights = contract.rand(4, _FLOWS, like=t)
    controls: dict[str, Any] = {"an int": 1, "an index": torch.tensor([0, 1, 1, 0], device="cpu"), "weights": weights}
    for kind, control in controls.items():
        whole = contract.attempt(
            f"divergence under {kind}", lambda c=control: quiet(lambda: divergence(o, mean, noise, c))
        )
        one = quiet(lambda c=control: divergence(o, mean[1:2], noise[1:2], c if isinstance(c, int) else c[1:2]))
        contract.close(f"each path as by itself ({kind})", one[0], whole[1])
    for promise, other in contract.copies(o):
        contract.close(promise, divergence(other, mean, noise, 1), divergence(o, mean, noise, 1))
        contract.require("copies are equal", other == o, other, o)
    contract.attempt("config holds JSON values", lambda: json.dumps(o.config))
    if contract.keeps("gradients"):
        leaf, ahead = mean.clone().requires_grad_(), contract.randn(4, _DIM, like=t)
        (gradient,) = torch.autograd.grad(divergence(o, leaf, noise, 1).sum(), leaf)
        ends = [quiet(lambda s=s: divergence(o, mean + s * ahead, noise, 1).sum()) for s in (STEP, -STEP)]
        contract.close(
            "the gradient is that of the value", (gradient * ahead).sum(), (ends[0] - ends[1]) / (2 * STEP), 1e-6
        )
    _check_weights(contract, o, flow, prior, mean, t, divergence)


def _check_weights(
    contract: Contract, o: Objective, flow: LatentFlow, prior: Any, mean: Tensor, t: Tensor, divergence: Any
) -> None:
    """Importance weights against the divergence; both are means over draws."""
    noise = contract.randn(_DRAWS, 4, _DIM, like=t)
    q = Independent(Normal(mean, torch.full_like(mean, 0.5)), 1)
    path = flow(mean + 0.5 * noise, t, 1, log_det=o.log_det)
    log_p = contract.randn(3, _DRAWS, 4, like=t)
    try:
        found = quiet(lambda: o.log_weights(log_p, q, prior, path, t, 1))
    except NoImportanceWeightsError:
        return
    shaped = found.ndim == 3 and (found.shape[0], found.shape[2]) == (_DRAWS, 4)
    contract.require("log_weights are [S, F, B]", shaped, list(found.shape), [_DRAWS, "F", 4])
    flat = quiet(lambda: divergence(o, mean.repeat(_DRAWS, 1), noise.flatten(0, 1), 1)).reshape(_DRAWS, 4)
    gap = found.sum(1) - (log_p.sum(0) - flat)
    error = 6 * gap.std(0) / _DRAWS**0.5 + 1e-6
    promise = "E ln w is E ln p(x|z) less the divergence"
    contract.require(promise, (gap.mean(0).abs() <= error).all(), f"a gap of {gap.mean(0).tolist()}", error.tolist())


def check_estimator(e: FactorEstimator, *, without: Iterable[str] = ()) -> None:
    """Checks that an estimator of the expectation over q(k|x) keeps what models rely on, on losses that are made up.

    Terms ``[B]`` in training steps early and late, finite, with gradients for what infers k and for what is trained under
    k; the same under equal generators and none from PyTorch's global one; `advance` counts; copies, ``state_dict``.

    Args:
        e: The estimator.
        without: Names of `PROMISES` that it is excused from.

    Raises:
        ContractError: If a promise is broken.
        TypeError: If ``e`` is no estimator.
        ValueError: If ``without`` names no promise.

    Example:
        >>> import flowfactor as ff
        >>> ff.testing.check_estimator(ff.models.GumbelEstimator())
    """
    if not isinstance(e, FactorEstimator):
        raise TypeError(f"check_estimator takes a flowfactor.models.FactorEstimator, got {type(e).__name__}")
    contract = Contract(e, without)
    device = e.step.device
    like = torch.zeros((), device=device)
    raw, scores = (contract.randn(6, 3, like=like).requires_grad_() for _ in range(2))

    def batch(seed: int) -> FactorBatch:
        table = raw.square()  # what each sequence loses under each flow

        def terms(loss: Tensor) -> SequenceTerms:
            zero = torch.zeros_like(loss)
            return SequenceTerms(loss, -loss, zero, zero, zero, zero)

        def under(control: Control) -> SequenceTerms:
            assert isinstance(control, Tensor)
            weights = control if control.is_floating_point() else torch.nn.functional.one_hot(control, 3).to(table)
            return terms((weights * table).sum(-1))

        return FactorBatch(
            scores.log_softmax(-1), torch.full((3,), 1 / 3, device=device).log(),
            torch.Generator(device).manual_seed(seed), under, lambda q: terms(torch.where(q.isfinite(), table, 0.0)),
            lambda frames: table.detach(),
        )  # fmt: skip

    def losses(e: FactorEstimator) -> list[Tensor]:
        found = e.expectation(batch(1))
        contract.require("expectation gives SequenceTerms", isinstance(found, SequenceTerms), found, "SequenceTerms")
        for name, value in vars(found).items():
            contract.tensor(f"{name} of each sequence", value, (6,), like)
        return [found.loss, found.kl_factor]

    early, late = copy.deepcopy(e).train(), copy.deepcopy(e).train()
    late.step.fill_(100_000)
    for when, each in (("early", early), ("late", late)):
        with contract.silent():
            loss, kl = contract.attempt(f"a training step, {when}", lambda each=each: losses(copy.deepcopy(each)))
            contract.close(f"equal generators give equal losses, {when}", losses(copy.deepcopy(each))[0], loss)
        contract.require("the divergence of q(k|x) is not negative", (kl > -1e-5).all(), kl.tolist(), "at least 0")
        for what, leaf in (("q(k|x)", scores), ("what is trained under k", raw)):
            (gradient,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True, allow_unused=True)
            reached = gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
            contract.require(f"the loss has a gradient for {what}, {when}", reached, gradient, "finite numbers")
    before = int(early.step)
    early.advance()
    contract.require("advance counts a step", int(early.step) == before + 1, int(early.step), before + 1)
    check_module(contract, late.eval(), lambda e: losses(copy.deepcopy(e)))
