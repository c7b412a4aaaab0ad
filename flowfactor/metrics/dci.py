"""Disentanglement, completeness and informativeness of codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowfactor.errors import require
from flowfactor.metrics._codes import check_codes
from flowfactor.metrics.estimates import CONFIDENCE, Estimate, bootstrapped, resample

DCI_METHODS = ("fast", "forest", "boosting", "lasso")
_FAST_LIMIT = 2_000  # samples to fit on: the small trees of the fast variant gain little from more


@dataclass(frozen=True)
class DCI:
    """The three scores of `dci`, each in [0, 1]; higher is better.

    Attributes:
        disentanglement: How far each latent dimension serves one factor only.
        completeness: How far each factor is held by one latent dimension only.
        informativeness: How well the factors can be told from the whole code, on samples not fitted to: the mean accuracy,
            with ``lasso`` the mean $R^2$.
        importance: How much each dimension matters to the prediction of each factor, ``[D, F]``, columns summing to 1.
        per_dimension: Disentanglement of each dimension, ``[D]``.
        per_factor: Completeness of each factor, ``[F]``.
        method: What predicted the factors.
    """

    disentanglement: Estimate
    completeness: Estimate
    informativeness: Estimate
    importance: Tensor
    per_dimension: Tensor
    per_factor: Tensor
    method: str

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values, less the table of importances."""
        return {
            "disentanglement": self.disentanglement.as_dict(),
            "completeness": self.completeness.as_dict(),
            "informativeness": self.informativeness.as_dict(),
            "per_dimension": self.per_dimension.tolist(),
            "per_factor": self.per_factor.tolist(),
            "method": self.method,
        }


def dci(
    codes: Any,
    labels: Any,
    *,
    method: Literal["fast", "forest", "boosting", "lasso"] = "forest",
    train_fraction: float = 0.5,
    resamples: int | None = None,
    confidence: float = CONFIDENCE,
    generator: torch.Generator | None = None,
) -> DCI:
    r"""Disentanglement, completeness and informativeness (Eastwood and Williams, ICLR 2018, section 2).

    Each factor is predicted from the whole code; $R_{df}$ is how much dimension d matters to the prediction of factor f.
    With $P_{df} = R_{df} / \sum_f R_{df}$, $\tilde P_{df} = R_{df} / \sum_d R_{df}$ and
    $\rho_d = \sum_f R_{df} / \sum_{df} R_{df}$,

    $$D = \sum_d \rho_d \Bigl(1 + \sum_f P_{df} \log_F P_{df}\Bigr), \qquad
      C = \frac1F \sum_f \Bigl(1 + \sum_d \tilde P_{df} \log_D \tilde P_{df}\Bigr),$$

    and informativeness is how good the predictions are on samples that were not fitted to. Predictors:

    - ``forest``: random forests of 100 trees (the paper's non-linear choice);
    - ``boosting``: gradient boosted trees, as in Locatello et al. (ICML 2019); by far the slowest;
    - ``lasso``: linear regression with an L1 penalty of 0.02 on standardised codes and factors (the paper's
      linear choice; for ordered factors);
    - ``fast``: forests of 20 trees on at most 2,000 samples.

    Read D and C with the informativeness: where that is at chance, importances are those of noise. The trees' are then
    spread over all dimensions (D and C near 0), but the few weights that survive the lasso by accident can look
    disentangled. The interval is the standard bootstrap's: every resample fits all predictors anew.

    Args:
        codes: Codes ``[N, D]``, at least two dimensions.
        labels: The true factors ``[N, F]``, at least two, each discrete.
        method: What predicts the factors.
        train_fraction: Share of the samples to fit to; the others measure the informativeness.
        resamples: Bootstrap resamples for the intervals; 0 for no interval. By default 10, with ``boosting`` 0.
        confidence: Confidence of the intervals.
        generator: Source of the split, the resamples and the trees.

    Returns:
        The three scores.

    Raises:
        TypeError: If codes or labels are no arrays of real numbers.
        ValueError: If a shape does not fit, a value is not finite, a factor is constant or continuous, or a setting is
            out of range.
        ImportError: If scikit-learn is not installed.

    Example:
        >>> import torch, flowfactor as ff
        >>> factors = torch.cartesian_prod(torch.arange(4), torch.arange(5)).repeat(10, 1)
        >>> score = ff.metrics.dci(factors.float(), factors, method="fast", resamples=2)
        >>> round(score.disentanglement.value, 1), score.informativeness.value
        (1.0, 1.0)
    """
    if method not in DCI_METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, DCI_METHODS))}, got {method!r}")
    if not 0 < train_fraction < 1:
        raise ValueError(f"train_fraction must lie between 0 and 1, got {train_fraction!r}")
    codes, classes, _ = check_codes(codes, labels, least=4)
    for name, size in (("dimension", codes.shape[1]), ("factor", classes.shape[1])):
        if size < 2:
            raise ValueError(f"with a single {name} there is nothing to disentangle: dci needs at least two")
    values = torch.as_tensor(labels).detach().to("cpu", torch.float64) if method == "lasso" else classes
    device = None if generator is None else generator.device
    order = torch.randperm(len(codes), generator=generator, device=device).cpu()
    cut = min(max(round(train_fraction * len(codes)), 1), len(codes) - 1)
    train, test = order[:cut], order[cut:]
    if method == "fast":
        train = train[:_FAST_LIMIT]
    seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
    predict = _predictor(method, seed)

    def scores(fit: Tensor, judge: Tensor) -> tuple[Tensor, Tensor]:
        importance, quality = predict(codes, values, fit, judge)
        return importance, torch.stack([*(part[0] for part in _scores(importance)), quality.mean()])

    def resampled(index: Tensor) -> Tensor:
        # Draws stay on their side of the split.
        return scores(train[index[: len(train)] % len(train)], test[index[-len(test) :] % len(test)])[1]

    resamples = (0 if method == "boosting" else 10) if resamples is None else resamples
    importance, three = scores(train, test)
    draws = resample(resampled, len(codes), resamples, generator)
    (_, per_dimension), (_, per_factor) = _scores(importance)
    each = [
        bootstrapped(float(three[i]), None if draws is None else draws[:, i], len(train) + len(test), confidence)
        for i in range(3)
    ]
    return DCI(each[0], each[1], each[2], importance, per_dimension, per_factor, method)


def _scores(importance: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Disentanglement and completeness of importances [D, F]: each the total and its parts."""
    by_dimension, by_factor = _focus(importance), _focus(importance.T)
    weight = importance.sum(1) / importance.sum().clamp(min=1e-300)
    return ((weight * by_dimension).sum(), by_dimension), (by_factor.mean(), by_factor)


def _focus(rows: Tensor) -> Tensor:
    """1 less the entropy of each row, in units of the uniform row's; 0 for a row of zeros."""
    total = rows.sum(1, keepdim=True)
    share = rows / total.clamp(min=1e-300)
    entropy = -torch.xlogy(share, share).sum(1) / torch.tensor(float(rows.shape[1])).log()
    return torch.where(total.squeeze(1) > 0, 1 - entropy, 0.0)


Predict = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _predictor(method: str, seed: int) -> Predict:
    """A function of codes, labels, and the samples to fit to and to judge by: importances [D, F], qualities [F]."""
    if method == "lasso":
        linear = require("sklearn.linear_model", extra="data")
        return lambda *data: _lasso(linear.Lasso(alpha=0.02), *data)
    ensemble = require("sklearn.ensemble", extra="data")
    if method == "boosting":
        return lambda *data: _trees(ensemble.GradientBoostingClassifier(random_state=seed), *data)
    # Few features a split would let a useless dimension win where the good ones are not offered: all are.
    settings = {"max_features": None, "random_state": seed}
    return lambda *data: _trees(ensemble.RandomForestClassifier(20 if method == "fast" else 100, **settings), *data)


def _trees(trees: Any, codes: Tensor, classes: Tensor, fit: Tensor, judge: Tensor) -> tuple[Tensor, Tensor]:
    importance = torch.zeros(codes.shape[1], classes.shape[1], dtype=torch.float64)
    quality = torch.zeros(classes.shape[1], dtype=torch.float64)
    given, asked = codes[fit].numpy(), codes[judge].numpy()
    for factor in range(classes.shape[1]):
        known = classes[fit, factor]
        if bool((known == known[0]).all()):  # a resample of few samples may hold one class; then it is the prediction
            quality[factor] = (classes[judge, factor] == known[0]).double().mean()
            continue
        trees.fit(given, known.numpy())
        importance[:, factor] = torch.as_tensor(trees.feature_importances_)
        quality[factor] = float(trees.score(asked, classes[judge, factor].numpy()))
    return importance, quality


def _lasso(lasso: Any, codes: Tensor, values: Tensor, fit: Tensor, judge: Tensor) -> tuple[Tensor, Tensor]:
    def standard(columns: Tensor) -> Tensor:
        return (columns - columns[fit].mean(0)) / columns[fit].std(0).clamp(min=1e-12)

    codes, values = standard(codes), standard(values)
    weights, quality = [], []
    for column in values.unbind(1):
        lasso.fit(codes[fit].numpy(), column[fit].numpy())
        weights.append(torch.as_tensor(lasso.coef_).abs())
        miss = column[judge] - torch.as_tensor(lasso.predict(codes[judge].numpy()))
        spread = column[judge].var(correction=0).clamp(min=1e-12)
        quality.append((1 - miss.square().mean() / spread).clamp(min=0))
    importance = torch.stack(weights, 1)
    return importance / importance.sum(0).clamp(min=1e-300), torch.stack(quality)
