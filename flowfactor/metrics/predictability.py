"""Variation predictability: whether a small classifier can tell a model's transformations apart from few examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowfactor._checks import check_count
from flowfactor._evaluating import evaluating
from flowfactor.context import Context
from flowfactor.metrics.estimates import CONFIDENCE, Estimate, student_quantile, wilson
from flowfactor.models.inputs import rows_of
from flowfactor.models.protocols import Transforms

_BATCH = 64
_WIDTHS = (16, 32, 32)


@dataclass(frozen=True)
class VPScore:
    """A variation predictability score.

    Attributes:
        accuracy: Accuracy on the pairs not trained on, mean over repeats, with its interval; its ``count`` is the number
            of these pairs.
        per_repeat: The accuracy of each repeat, ``[R]``.
        chance: The accuracy of always naming the commonest transformation.
        train_count: Number of pairs trained on.
        fraction: The share of pairs asked to be trained on.
    """

    accuracy: Estimate
    per_repeat: Tensor
    chance: float
    train_count: int
    fraction: float

    def __float__(self) -> float:
        return self.accuracy.value

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            **self.accuracy.as_dict(),
            "per_repeat": self.per_repeat.tolist(),
            "chance": self.chance,
            "train_count": self.train_count,
            "fraction": self.fraction,
        }


def vp_score(
    model: Transforms,
    images: Tensor,
    t: Tensor | Sequence[float],
    *,
    context: Context | None = None,
    fraction: float = 0.1,
    repeats: int = 5,
    steps: int = 200,
    batch_size: int = 256,
    confidence: float = CONFIDENCE,
    generator: torch.Generator | None = None,
) -> VPScore:
    r"""The variation predictability of a model's transformations (Zhu et al., ECCV 2020), as in Song et al. (2023).

    Each image is transformed by one of the K flows, as many images by each. A small classifier is trained on a few of
    the pairs $[x_0, x_T]$, both decoded, to tell k; the score is its accuracy on all others. The more a model's flows
    differ in what they do to any image, the fewer examples tell them apart. It needs no true transformations, and does
    not ask whether these are the ones found.

    Args:
        model: A model with ``transform`` and ``num_flows`` (at least two).
        images: Images to start from, ``[N, C, H, W]``, at least two a flow.
        t: Times ``[T+1]`` in frames; the first and the last frame make the pair.
        context: Features of each image ``[N, C]``, or such a tensor for each name, for a model that takes a context.
        fraction: Share of the pairs to train on; the paper has 0.1 and 0.01.
        repeats: How often to draw the training pairs and train anew.
        steps: Training steps of the classifier.
        batch_size: Images transformed at a time.
        confidence: Confidence of the interval.
        generator: Source of all draws, on the CPU.

    Returns:
        The score.

    Raises:
        TypeError: If the images are no floats.
        ValueError: If a shape does not fit, or there are too few flows or images.

    Example:
        >>> import torch, flowfactor as ff
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=2, latent_dim=4, hidden=(8, 8))
        >>> score = ff.metrics.vp_score(model, torch.rand(40, 1, 8, 8), [0, 1, 2], steps=5, repeats=2)
        >>> score.train_count, score.accuracy.count
        (4, 36)
    """
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4:
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a float tensor [N, C, H, W] with values in [0, 1], got {got}")
    if model.num_flows < 2:
        raise ValueError("with a single flow there is nothing to tell apart: vp_score needs at least two")
    if len(images) < 2 * model.num_flows:
        raise ValueError(f"at least two images a flow are needed, {2 * model.num_flows}, got {len(images)}")
    t = torch.as_tensor(t, dtype=images.dtype, device=images.device)
    if t.ndim != 1 or len(t) < 2:
        raise ValueError(f"t must hold at least two times, shape [T+1], got {list(t.shape)}")
    order = torch.randperm(len(images), generator=generator)
    k = (order % model.num_flows).to(images.device)
    before, after = [], []
    with evaluating(model), torch.no_grad():
        for rows in torch.arange(len(images), device=images.device).split(batch_size):
            also = {} if context is None else {"context": rows_of(context, rows)}
            made = model.transform(images[rows], t, k[rows], **also)
            before.append(made[:, 0])
            after.append(made[:, -1])
    settings: dict[str, Any] = {"fraction": fraction, "repeats": repeats, "steps": steps, "confidence": confidence}
    return vp_score_from_pairs(torch.cat(before), torch.cat(after), k, **settings, generator=generator)


def vp_score_from_pairs(
    before: Tensor,
    after: Tensor,
    k: Any,
    *,
    fraction: float = 0.1,
    repeats: int = 5,
    steps: int = 200,
    confidence: float = CONFIDENCE,
    generator: torch.Generator | None = None,
) -> VPScore:
    r"""The variation predictability of pairs of images (Zhu et al., ECCV 2020): `vp_score` on pairs of one's own.

    The classifier has three convolutions (16, 32 and 32 channels, 3x3, stride 2, ReLU) on the pair and its
    difference, average pooling to 2x2 and a linear layer; Adam at 0.003 with a cosine decay, batches of up to 64. The
    training pairs are drawn in proportion to the transformations, at least one of each.

    The interval joins two uncertainties: Wilson's of the accuracy on the other pairs, and Student's of the mean over
    repeats, which differ by training pairs and initial weights; half-widths add as squares.

    Args:
        before: First images of the pairs, ``[N, C, H, W]``.
        after: Second images, of the same shape.
        k: The transformation of each pair ``[N]``, integers, at least two pairs of each.
        fraction: Share of the pairs to train on, in (0, 1).
        repeats: How often to draw the training pairs and train anew; with 1, the interval is Wilson's alone.
        steps: Training steps of the classifier.
        confidence: Confidence of the interval.
        generator: Source of all draws, on the CPU.

    Returns:
        The score.

    Raises:
        TypeError: If images are no floats, or k holds no integers.
        ValueError: If a shape does not fit, a value is not finite, a setting is out of range, or a transformation has
            fewer than two pairs or there is only one.

    Example:
        >>> import torch, flowfactor as ff
        >>> before, k = torch.rand(60, 1, 8, 8), torch.arange(60) % 2
        >>> after = torch.where(k[:, None, None, None] == 0, before / 2, before)       # darken, or leave
        >>> float(ff.metrics.vp_score_from_pairs(before, after, k, fraction=0.2, repeats=1)) > 0.9
        True
    """
    classes = _check_pairs(before, after, k)
    repeats, steps = check_count("repeats", repeats), check_count("steps", steps)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, for example 0.1 or 0.01, got {fraction!r}")
    wilson(0, 0, confidence=confidence)  # a bad confidence is refused before the training
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"the generator must be on the CPU, where the splits are drawn, got {generator.device}")
    pairs = torch.cat([before, after, after - before], 1).detach()
    hits, accuracies, trials, count = 0, [], 0, 0
    for _ in range(repeats):
        train = _stratified(classes, fraction, generator)
        count = int(train.sum())
        right = _train_and_test(pairs, classes.to(pairs.device), train.to(pairs.device), steps, generator)
        hits, trials = hits + right, len(classes) - count
        accuracies.append(right / trials)
    per_repeat = torch.tensor(accuracies, dtype=torch.float64)
    accuracy = _joined(hits / repeats, trials, per_repeat, confidence)
    return VPScore(accuracy, per_repeat, float(classes.bincount().max() / len(classes)), count, fraction)


def _check_pairs(before: Any, after: Any, k: Any) -> Tensor:
    """Checks pairs; returns the classes [N], numbered from 0 without gaps."""
    for name, images in (("before", before), ("after", after)):
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"{name} must be a float tensor [N, C, H, W], got {got}")
        if images.ndim != 4 or not bool(images.isfinite().all()):
            raise ValueError(f"{name} must hold finite images [N, C, H, W], got {list(images.shape)}")
    labels = torch.as_tensor(k).cpu()
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"k must hold integers, got {labels.dtype}")
    if before.shape != after.shape or labels.shape != before.shape[:1]:
        shapes = f"{list(before.shape)}, {list(after.shape)} and {list(labels.shape)}"
        raise ValueError(f"before and after must be [N, C, H, W] and k [N], got {shapes}")
    values, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    if len(values) < 2 or int(counts.min()) < 2:
        found = dict(zip(values.tolist(), counts.tolist(), strict=True))
        raise ValueError(f"there must be at least two transformations with two pairs each, got pairs by k: {found}")
    return classes


def _stratified(classes: Tensor, fraction: float, generator: torch.Generator | None) -> Tensor:
    """A mask [N] of training pairs: about the same share of each class, at least one and not all."""
    train = torch.zeros(len(classes), dtype=torch.bool)
    for label in range(int(classes.max()) + 1):
        own = (classes == label).nonzero().flatten()
        wanted = min(max(round(fraction * len(own)), 1), len(own) - 1)
        train[own[torch.randperm(len(own), generator=generator)[:wanted]]] = True
    return train


def _classifier(channels: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for width in _WIDTHS:
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes))


def _train_and_test(
    pairs: Tensor, classes: Tensor, train: Tensor, steps: int, generator: torch.Generator | None
) -> int:
    """Trains a classifier on the masked pairs; returns how many of the others it gets right."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):  # the layers draw their weights from the global source
        torch.random.manual_seed(seed)
        network = _classifier(pairs.shape[1], int(classes.max()) + 1).to(pairs)
    given, known = pairs[train], classes[train]
    centre, scale = given.mean((0, 2, 3), keepdim=True), given.std((0, 2, 3), keepdim=True).clamp(min=1e-3)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3, weight_decay=1e-4)
    with torch.enable_grad():
        for step in range(steps):
            rows = torch.randperm(len(given), generator=generator)[:_BATCH].to(pairs.device)
            loss = F.cross_entropy(network((given[rows] - centre) / scale), known[rows])
            optimiser.zero_grad()
            loss.backward()
            for group in optimiser.param_groups:
                group["lr"] = 1.5e-3 * (1 + math.cos(math.pi * (step + 1) / steps))
            optimiser.step()
    others = (~train).nonzero().flatten()
    right = 0
    with torch.no_grad():
        for rows in others.split(1024):
            right += int((network((pairs[rows] - centre) / scale).argmax(-1) == classes[rows]).sum())
    return right


def _joined(hits: float, trials: int, per_repeat: Tensor, confidence: float) -> Estimate:
    """The mean accuracy with an interval that covers both the test pairs and the repeats."""
    single = wilson(hits, trials, confidence=confidence)
    repeats, value = len(per_repeat), single.value
    spread = 0.0
    if repeats > 1:
        spread = student_quantile(confidence, repeats - 1) * float(per_repeat.std()) / repeats**0.5
    low = value - math.hypot(value - single.low, spread)
    high = value + math.hypot(single.high - value, spread)
    return Estimate(value, max(low, 0.0), min(high, 1.0), trials, confidence)
