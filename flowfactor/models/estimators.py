r"""Weak supervision: which of the K flows acts is not told, but inferred for each sequence as q(k|x).

Whatever bounds $\ln p(x|k)$ from below by $-\ell_k$ gives a bound without k, one per sample:
$$\ln p(x) \ge -E_{q(k|x)}[\ell_k] - KL[q(k|x) \,|\, p(k)] .$$
The estimators differ in how they take the expectation and in what q(k|x) learns from. One of one's own is a subclass of
`FactorEstimator` with one method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowfactor._checks import check_count, check_optional_count
from flowfactor._config import Named, named
from flowfactor.control import Control
from flowfactor.models.checks import check_positive
from flowfactor.models.responsibilities import anneal, balanced_responsibilities
from flowfactor.models.terms import SequenceTerms
from flowfactor.registry import BUILT_IN, declare

_NEW = 0.1  # weight of a step's overlap in the running mean


@dataclass(frozen=True)
class FactorBatch:
    """Sequences whose k is inferred: what a `flowfactor.models.FactorEstimator` takes its expectation over.

    Attributes:
        log_q: ln q(k|x), ``[B, K]``, with the gradient of what infers it.
        log_prior: ln p(k), ``[K]``.
        generator: Source of all draws.
        under: Solves every sequence under a k of its own, an index or weights: ``under(k [B] or [B, K])`` gives
            `SequenceTerms` ``[B]``, whose loss has everything but the divergence of q(k|x).
        every: Solves every sequence under every flow for which ``log_q [B, K]`` is finite: ``every(log_q)`` gives
            `SequenceTerms` ``[B, K]``.
        judged: Minus the bound of every sequence under every flow, from so many frames each and without regularizers:
            ``judged(frames)`` gives ``[B, K]``, at the cost of K solves; all frames where None.
    """

    log_q: Tensor
    log_prior: Tensor
    generator: torch.Generator | None
    under: Callable[[Control], SequenceTerms]
    every: Callable[[Tensor], SequenceTerms]
    judged: Callable[[int | None], Tensor]

    def divergence(self, log_q: Tensor) -> Tensor:
        """KL[q(k|x) | p(k)] of each sequence, ``[B]``."""
        return factor_divergence(log_q, self.log_prior)

    def expected(self, log_q: Tensor) -> SequenceTerms:
        """The exact expectation over q(k|x), with its divergence, ``[B]``; flows with ln q of -inf are not solved."""
        return self.every(log_q).expected(log_q).with_factor(self.divergence(log_q))


class FactorEstimator(Named, nn.Module):
    """Base of the estimators of the expectation over q(k|x): a subclass gives `expectation`.

    An estimator counts the training steps that it took part in; its schedule goes by them. The count is a buffer, saved
    and loaded with the model, so that resumed training goes on where it was. Constructor arguments are remembered;
    `flowfactor.register_estimator` gives a class of one's own a name, by which saved models find it.

    Args:
        config: Has no effect any more: arguments of constructors are remembered by themselves.

    Attributes:
        step: Training steps so far, an int64 scalar.
        prune: Smallest q(k|x) for which flow k is solved in training; 0 solves all.

    Example:
        >>> import torch, flowfactor as ff
        >>> class Likeliest(ff.models.FactorEstimator):               # every sequence trains the flow that is likeliest
        ...     def expectation(self, batch):
        ...         terms = batch.under(batch.log_q.argmax(-1))
        ...         return terms.with_factor(batch.divergence(batch.log_q))
        >>> sizes = {"hidden": (8, 8), "supervision": "weak", "num_frames": 5}
        >>> model = ff.models.build_vae((1, 8, 8), 2, 4, estimator=Likeliest(), **sizes)
        >>> model(torch.rand(6, 5, 1, 8, 8), torch.arange(5)).loss.backward()
    """

    kind_of_part = "estimator"
    prune: float = 0.0

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def expectation(self, batch: FactorBatch) -> SequenceTerms:
        """The terms of a training step: the one method that a subclass has to give.

        Args:
            batch: The sequences with q(k|x) and p(k), and what the flows make of them.

        Returns:
            The terms of each sequence, ``[B]``: ``loss`` is what is minimised, of the flows and of q(k|x), and
            ``kl_factor`` the divergence of q(k|x) from p(k).
        """
        raise NotImplementedError(f"{type(self).__name__} must define expectation(batch) -> SequenceTerms")

    def advance(self) -> None:
        """Counts a training step."""
        self.step += 1

    @staticmethod
    def build(estimator: FactorEstimator | str | Mapping[str, Any]) -> FactorEstimator:
        """Gives an estimator from what a user or a config file names.

        Args:
            estimator: An estimator (returned as it is), a name, or a `config` mapping.

        Returns:
            The estimator.

        Raises:
            ValueError: If the name or a setting is unknown.
            TypeError: If it is none of these.

        Example:
            >>> FactorEstimator.build({"name": "gumbel", "rate": 1e-3}).config["rate"]
            0.001
        """
        return named(FactorEstimator, estimator)


class EnumerateEstimator(FactorEstimator):
    r"""The exact expectation over all K flows, $\sum_k q(k|x)\,\ell_k + KL[q(k|x) \,|\, p(k)]$ per sample.

    Flows whose q(k|x) has fallen below ``prune`` are left out in training, and q is renormalised over the others: a
    posterior like any other, so that the bound stays a true one, at the cost of one flow where q is sure.

    Args:
        prune: Smallest q(k|x) for which a flow is still solved in training; 0 solves all.

    Raises:
        ValueError: If ``prune`` is out of range.

    Example:
        >>> EnumerateEstimator(prune=0.001).prune
        0.001
    """

    name: ClassVar[str] = "enumerate"

    def __init__(self, prune: float = 1e-4) -> None:
        if not 0 <= prune < 0.5:
            raise ValueError(f"prune must lie in [0, 0.5), got {prune!r}")
        super().__init__()
        self.prune = float(prune)

    def expectation(self, batch: FactorBatch) -> SequenceTerms:
        """The exact expectation over the flows that are not left out."""
        return batch.expected(truncate(batch.log_q, self.prune))


class GumbelEstimator(FactorEstimator):
    r"""One flow per sample, drawn by a straight-through Gumbel-softmax (Jang et al., ICLR 2017, section 2.2).

    Forward, each sample follows the flow $\arg\max_k (\ln q(k|x) + g_k)$ with Gumbel noise $g_k$, an exact draw from
    q(k|x). Backward, the gradient is that of the softmax of the same at a temperature that falls as
    $\mathrm{start} \cdot e^{-\mathrm{rate} \cdot \mathrm{step}}$ down to ``end``: it reaches q through the weights with
    which each sample's flows are superposed. The default schedule is that of Song et al. (NeurIPS 2023).

    Args:
        start: Temperature at the beginning.
        end: Lowest temperature.
        rate: How fast it falls, per step.

    Raises:
        ValueError: If a temperature is not positive, or the rate negative.

    Example:
        >>> import torch
        >>> weights = GumbelEstimator().draw(torch.zeros(4, 3).log_softmax(-1))
        >>> weights.sum(-1).tolist(), weights.max().item()
        ([1.0, 1.0, 1.0, 1.0], 1.0)
    """

    name: ClassVar[str] = "gumbel"

    def __init__(self, start: float = 1.0, end: float = 0.05, rate: float = 3e-5) -> None:
        check_positive("start", start)
        if check_positive("end", end) > start:
            raise ValueError(f"the temperature falls: end must not exceed start, got {end} and {start}")
        if not 0 <= rate < math.inf:
            raise ValueError(f"rate must be a finite number that is not negative, got {rate!r}")
        super().__init__()
        self.start, self.end, self.rate = float(start), float(end), float(rate)

    @property
    def temperature(self) -> float:
        """The temperature of the step to come."""
        return max(self.end, self.start * math.exp(-self.rate * int(self.step)))

    def expectation(self, batch: FactorBatch) -> SequenceTerms:
        """The terms under one drawn flow a sequence."""
        terms = batch.under(self.draw(batch.log_q, batch.generator))
        return terms.with_factor(batch.divergence(batch.log_q))

    def draw(self, log_q: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws one flow per sample, as weights.

        Args:
            log_q: ln q(k|x) ``[B, K]``.
            generator: Source of the noise.

        Returns:
            One-hot weights ``[B, K]`` with the gradient of the relaxed draw.
        """
        noise = -torch.empty_like(log_q).exponential_(generator=generator).log()
        scores = log_q + noise
        soft = (scores / self.temperature).softmax(-1)
        hard = nn.functional.one_hot(scores.argmax(-1), log_q.shape[-1]).to(log_q)
        return hard + (soft - soft.detach())


class BalancedEstimator(FactorEstimator):
    r"""All K flows, trained on responsibilities that are balanced over the batch while a temperature falls.

    Left to itself, q(k|x) collapses: the flow that is better at first gets more samples, which makes it better still.
    Here the samples are shared out by `balanced_responsibilities` $r_{ik}$, so that every flow gets its part, the more
    so the hotter. The flows' losses are only evaluated for that. Each sample then trains one flow, drawn by its
    responsibilities (an unbiased draw of $\sum_k r_{ik} \ell_{ik}$), and q(k|x) learns them by cross-entropy.
    The temperature falls geometrically from ``tau`` to ``tau_end`` over ``anneal_steps`` steps. It has to start at the size
    of the differences between losses, which grow with the number of pixels. Behind it the loss is the exact expectation
    of `EnumerateEstimator`, with q(k|x) alone in charge: no marginal is imposed any more. That waits until q(k|x) has
    learned the responsibilities, since flows that it confused would grow together: until the two overlap by ``handover``,
    or ``anneal_steps`` have passed once more.

    Imposed marginals are an assumption. Where transformations are unequally frequent and the frequencies are known, hand
    them to the model as ``factor_prior``; else a ``balance`` below 1 lets them give way as the temperature falls.

    Args:
        tau: Temperature at the beginning, in nats.
        tau_end: Temperature at the end of the annealing, in nats.
        anneal_steps: Length of the annealing, in training steps.
        balance: How firmly the marginals are held, from 0 to 1 (exactly); see `balanced_responsibilities`.
        iterations: Sinkhorn's iterations per step.
        prune: As for `EnumerateEstimator`, once the annealing is over.
        judge_frames: From how many frames of a sequence, drawn anew each time, its flows are judged; None for all. It is
            the part that costs K decodings.
        handover: The overlap $\sum_k \min(r_{ik}, q(k|x_i))$, a running mean over some ten steps, from which on q(k|x) takes
            over; 0 does not wait.

    Attributes:
        agreement: That running mean, a scalar.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> estimator = BalancedEstimator(tau=300.0, anneal_steps=1000)
        >>> estimator.temperature, estimator.annealed
        (300.0, False)
    """

    name: ClassVar[str] = "balanced"

    def __init__(
        self,
        tau: float = 300.0,
        tau_end: float = 1.0,
        anneal_steps: int = 500,
        balance: float = 1.0,
        iterations: int = 5,
        prune: float = 1e-4,
        judge_frames: int | None = 1,
        handover: float = 0.9,
    ) -> None:
        check_positive("tau", tau)
        if check_positive("tau_end", tau_end) > tau:
            raise ValueError(f"the temperature falls: tau_end must not exceed tau, got {tau_end} and {tau}")
        check_count("anneal_steps", anneal_steps)
        check_count("iterations", iterations)
        check_optional_count("judge_frames", judge_frames)
        if not 0 <= balance <= 1:
            raise ValueError(f"balance must lie between 0 (none) and 1 (exact), got {balance!r}")
        if not 0 <= prune < 0.5:
            raise ValueError(f"prune must lie in [0, 0.5), got {prune!r}")
        if not 0 <= handover <= 1:
            raise ValueError(f"handover must lie between 0 (at once) and 1, got {handover!r}")
        super().__init__()
        self.prune = float(prune)
        self.judge_frames, self.handover = judge_frames, float(handover)
        self.tau, self.tau_end, self.anneal_steps = float(tau), float(tau_end), anneal_steps
        self.balance, self.iterations = float(balance), iterations
        self.agreement: Tensor
        self.register_buffer("agreement", torch.zeros(()))

    def expectation(self, batch: FactorBatch) -> SequenceTerms:
        """The terms of one flow a sequence, drawn by responsibilities, and their cross-entropy; exact once annealed."""
        if self.annealed:
            return batch.expected(truncate(batch.log_q, self.prune))
        with torch.no_grad():
            r = self.responsibilities(batch.judged(self.judge_frames), batch.log_prior)
            k = torch.multinomial(r, 1, generator=batch.generator).squeeze(-1)
            kl_factor = batch.divergence(batch.log_q)
        terms = batch.under(k)
        if torch.is_grad_enabled():
            self.compare(r, batch.log_q)
        return replace(terms, loss=terms.loss - (r * batch.log_q).sum(-1), kl_factor=kl_factor)

    @property
    def annealed(self) -> bool:
        """Whether the annealing is over, and q(k|x) in charge."""
        step, length = int(self.step), self.anneal_steps
        return step >= length and (step >= 2 * length or float(self.agreement) >= self.handover)

    @torch.no_grad()
    def compare(self, r: Tensor, log_q: Tensor) -> None:
        """Notes by how much responsibilities ``[B, K]`` and ln q(k|x) ``[B, K]`` of a training step overlap."""
        self.agreement.lerp_(torch.minimum(r, log_q.exp()).sum(-1).mean().to(self.agreement), _NEW)

    @property
    def temperature(self) -> float:
        """The temperature of the step to come, in nats."""
        return anneal((self.tau, self.tau_end), int(self.step), self.anneal_steps)

    def responsibilities(self, losses: Tensor, log_prior: Tensor) -> Tensor:
        """Shares out samples by their losses ``[B, K]`` and ln p(k) ``[K]``, at the temperature of the step to come."""
        return balanced_responsibilities(
            losses, self.temperature, log_prior.exp(), balance=self.balance, iterations=self.iterations
        )


declare("estimator", balanced=BalancedEstimator, gumbel=GumbelEstimator, enumerate=EnumerateEstimator)
ESTIMATORS = BUILT_IN["estimator"]


def factor_divergence(log_q: Tensor, log_prior: Tensor) -> Tensor:
    """KL[q(k|x) | p(k)] per sample.

    Args:
        log_q: ln q(k|x) ``[*batch, K]``; -inf where q is 0.
        log_prior: ln p(k) ``[K]``.

    Returns:
        Divergences ``[*batch]``, in nats.

    Example:
        >>> import torch
        >>> sure, open = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
        >>> factor_divergence(torch.stack([sure, open]), open)
        tensor([0.6931, 0.0000])
    """
    present = log_q > -math.inf
    # 0 ln 0 = 0, and its gradient must not be NaN: the infinite entries are replaced before they are multiplied.
    ratio = torch.where(present, log_q, torch.zeros_like(log_q)) - log_prior
    return torch.where(present, log_q.exp() * ratio, torch.zeros_like(log_q)).sum(-1)


def truncate(log_q: Tensor, threshold: float) -> Tensor:
    """Leaves out what is less likely than a threshold, and renormalises the rest.

    Args:
        log_q: Log-probabilities ``[*batch, K]``.
        threshold: Below 1/K, so that something remains.

    Returns:
        Log-probabilities ``[*batch, K]``, -inf where left out.

    Example:
        >>> import torch
        >>> truncate(torch.tensor([0.001, 0.333, 0.666]).log(), 0.01).exp()
        tensor([0.0000, 0.3333, 0.6667])
    """
    if threshold <= 0:
        return log_q
    kept = log_q.detach() >= min(math.log(threshold), -math.log(log_q.shape[-1]) - 1e-3)
    return log_q.masked_fill(~kept, -math.inf).log_softmax(-1)


def check_factor_prior(prior: object, num_flows: int) -> Tensor:
    """Checks probabilities p(k), and gives ln p(k) ``[K]``; uniform where None."""
    if prior is None:
        return torch.full((num_flows,), -math.log(num_flows))
    if isinstance(prior, Tensor) and prior.requires_grad:
        raise ValueError("factor_prior is a setting, which is not learned: give factor_prior.detach()")
    try:
        p = torch.as_tensor(prior, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError) as error:
        raise TypeError(f"factor_prior must hold {num_flows} probabilities, got {prior!r}") from error
    if p.shape != (num_flows,) or not bool((p > 0).all()) or not math.isclose(float(p.sum()), 1.0, abs_tol=1e-4):
        raise ValueError(
            f"factor_prior must hold {num_flows} positive probabilities, one a flow, that sum to 1; got {p.tolist()}"
        )
    return (p / p.sum()).log().float()
