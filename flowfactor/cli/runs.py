"""``flowfactor evaluate`` and ``traverse``: what is done with runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowfactor.cli.errors import USER_ERRORS, fail, say
from flowfactor.cli.train import table
from flowfactor.errors import require
from flowfactor.training.config import Config
from flowfactor.training.folder import (
    CONFIG,
    EVALUATION,
    GRID,
    OF_THE_MODEL,
    TRAVERSAL,
    check_writable,
    foreign,
    owned,
    write_text,
)


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Measures the model of a run.

    Args:
        arguments: Its arguments.

    Returns:
        The exit code.
    """
    path = arguments.output or arguments.run_dir / EVALUATION
    try:
        if arguments.samples < 0 or (arguments.limit is not None and arguments.limit < 1):
            raise ValueError("--samples must not be negative, and --limit must be at least 1")
        model, config = _opened(arguments)
        check_target(path, arguments.overwrite)
        test = config.data.dataset("test")
        from flowfactor.models.protocols import knows_transformations
        from flowfactor.training.evaluation import evaluate
        from flowfactor.training.run import versions

        # Models without transformations get theirs searched on training data.
        train = None if knows_transformations(model) else config.data.dataset("train")
        other = _checked_data(arguments, test, train)
    except USER_ERRORS as error:
        fail("evaluate", error)

    count = None if arguments.limit is None else arguments.limit * max(test.num_flows, 1)
    without = arguments.samples == 0
    result = evaluate(
        model,
        test,
        train=train,
        limit=arguments.limit,
        likelihood_limit=0 if without else count,
        samples=arguments.samples or 1,
        seed=arguments.seed,
    )
    say(table(result))  # before it is written, which may fail
    with listed(path):
        write_text(path, json.dumps(result | other | {"versions": versions()}, indent=2) + "\n")
    say(f"\nwritten to {path}")
    return 0


def run_traverse(arguments: argparse.Namespace) -> int:
    """Draws test images along every flow of a run's model, or one along two of them.

    Args:
        arguments: Its arguments.

    Returns:
        The exit code.
    """
    grid, animation = arguments.grid, arguments.gif
    picture = arguments.output or arguments.run_dir / (GRID if grid else TRAVERSAL)
    images = (1 if grid else 3) if arguments.images is None else arguments.images
    try:
        for path, suffix in ((picture, ".png"), (animation, ".gif")):
            if path is not None and (path.suffix != suffix or not path.parent.is_dir()):
                raise ValueError(f"{path} must end in {suffix} and lie in a folder that exists")
        model, config = _opened(arguments)
        for path in (picture, animation):
            if path is not None:
                check_target(path, arguments.overwrite)
        test = config.data.dataset("test")
        _checked_data(arguments, test)
        if grid and images != 1:
            raise ValueError(f"--grid draws one test image, got --images {images}: leave that out")
        if not 1 <= images <= len(test) or (arguments.steps is not None and arguments.steps < 1):
            raise ValueError(f"--images must be between 1 and {len(test)}, and --steps at least 1")
        if arguments.back < 0:
            raise ValueError(f"--back must not be negative, got {arguments.back}")
        for module in ("matplotlib", "PIL.Image"):
            require(module, extra="plot")
        flows = _grid_flows(grid, model, test) if grid else None
    except USER_ERRORS as error:
        fail("traverse", error)
    with listed(picture):
        if flows:
            draw_grid(model, test, flows, picture, animation, steps=arguments.steps, back=arguments.back)
        else:
            draw(model, test, picture, animation, images=images, steps=arguments.steps, back=arguments.back)
    say("\n".join(str(path) for path in (picture, animation) if path is not None))
    return 0


def draw(
    model: Any,
    test: Any,
    picture: Path,
    animation: Path | None = None,
    *,
    images: int = 3,
    steps: int | None = None,
    back: int = 0,
) -> None:
    """Draws test images along every flow of a model.

    Args:
        model: The model.
        test: The test split, for the images and the names of the flows.
        picture: PNG to write.
        animation: GIF to write too, or None.
        images: How many images, spread over the split.
        steps: Steps forwards; those of the data where None.
        back: Steps backwards: sequences start at time 0, so these show how far the flows extrapolate.
    """
    from flowfactor import plot
    from flowfactor.metrics.matched import flow_names

    batch = test.batch(_spread(images, len(test)))
    x0, context = batch["frames"][:, 0], batch.get("context")
    reach = test.num_steps if steps is None else steps
    whole = list(range(-back, reach + 1))
    halves = [half / 2 for half in range(-2 * back, 2 * reach + 1)]
    names = flow_names(model, test)
    title = _carried(model, test, names)
    plot.save(plot.traverse_figure(model, x0, t=whole, flow_names=names, context=context, title=title), picture)
    if animation is not None:
        plot.to_gif(plot.traversal_frames(model, x0, t=halves, scale=2, context=context), animation)


def draw_grid(
    model: Any,
    test: Any,
    flows: tuple[int, int],
    picture: Path,
    animation: Path | None = None,
    *,
    steps: int | None = None,
    back: int = 0,
) -> None:
    """Draws a test image carried by one flow of a model across, and by another down.

    Args:
        model: The model.
        test: The test split, for the image and the names of the flows.
        flows: Both flows, by their number in the model.
        picture: PNG to write.
        animation: GIF to write too, or None.
        steps: Steps forwards; those of the data where None.
        back: Steps backwards.
    """
    from flowfactor import plot
    from flowfactor.metrics.matched import flow_names

    batch = test.batch(_spread(1, len(test)))
    context = batch.get("context")
    reach = test.num_steps if steps is None else steps
    # One image: a context of its own, or by name, has one row.
    asked = {"context": context, "t": range(-back, reach + 1), "flow_names": flow_names(model, test)}
    plot.save(plot.traverse_grid_figure(model, batch["frames"][0, 0], flows, **asked), picture)
    if animation is not None:
        plot.to_gif(plot.grid_frames(model, batch["frames"][0, 0], flows, scale=1, **asked), animation)


def _grid_flows(given: Sequence[str], model: Any, test: Any) -> tuple[int, int]:
    """The two flows of a grid by their number in the model, of their names or numbers; raises ValueError."""
    from flowfactor.metrics.matched import flow_names
    from flowfactor.models.protocols import knows_transformations

    if not knows_transformations(model):
        raise ValueError(f"--grid draws two flows, and a {type(model).__name__} has none")
    names = flow_names(model, test)
    found = [names.index(flow) if flow in names else int(flow) if flow.isdecimal() else -1 for flow in given]
    if found[0] == found[1] or not all(0 <= k < len(names) for k in found):
        raise ValueError(
            f"--grid takes two different flows of {', '.join(names)}, or their numbers; got {' '.join(given)}"
        )
    return found[0], found[1]


def _carried(model: Any, test: Any, names: Sequence[str]) -> str | None:
    """What the potential carries of every flow, for a title; None where there is none, or nobody can tell."""
    import torch

    from flowfactor.errors import FlowSolveError
    from flowfactor.metrics import MatchedModel, NoLatentFlowError, gradient_share

    if not test.num_flows or getattr(model, "num_flows", 0) != test.num_flows:
        return None
    order = torch.tensor([list(names).index(name) for name in test.flow_names])  # the model's flow of each
    try:
        shares = gradient_share(MatchedModel(model, order), test, limit=64).mean[order.argsort()]
    except (FlowSolveError, NoLatentFlowError, ValueError):
        return None
    told = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, shares.tolist(), strict=True))
    return f"carried by grad u: {told}"


def check_target(path: Path, overwrite: bool) -> None:
    """Checks, before any work, that a file may be written and can be.

    Args:
        path: The file.
        overwrite: Whether it may replace a file that no list of a run's folder shows to be flowfactor's.

    Raises:
        OSError: If there is no such folder, something else is in the file's place, or it cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}: create it first")
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder: give the name of a file")
    if not overwrite and path.name in foreign(path.parent, [path.name]):
        raise FileExistsError(
            f"{path} is there, and nothing shows that flowfactor wrote it: choose another name (--output), or replace it by "
            "--overwrite"
        )
    check_writable(path.parent)


def listed(path: Path) -> contextlib.AbstractContextManager[None]:
    """Puts a file that describes a run's model on the list of the run's folder, where it is written there."""
    if path.name in OF_THE_MODEL and (path.parent / CONFIG).is_file() and not path.exists():
        return owned(path.parent, path.name)
    return contextlib.nullcontext()


def _spread(count: int, total: int) -> list[int]:
    """Different indices below ``total``, about as far apart as can be.

    Equal distances would divide a grid of factors evenly, and show the same state of most of them.
    """
    stride = next(step for step in range(max(1, round(0.618 * total)), total + 2) if math.gcd(step, total) == 1)
    return [(index + 1) * stride % total for index in range(count)]


def _opened(arguments: argparse.Namespace) -> tuple[Any, Config]:
    """Loads the model of a run, and its settings."""
    from flowfactor.training import load_run

    model, config = load_run(arguments.run_dir, imports=arguments.imports)
    if arguments.root is not None:
        config.data.root = arguments.root
    return model, config


def _checked_data(arguments: argparse.Namespace, test: Any, train: Any = None) -> dict[str, Any]:
    """Checks that data are those of the run, or says in what they differ where the user asked for others."""
    from flowfactor.training.identity import check_data, data_of, differences

    now = {name: data.fingerprint() for name, data in (("test", test), ("train", train)) if data is not None}
    if not arguments.other_data:
        check_data(
            arguments.run_dir,
            now,
            "give the folder of its own data by --root, or take these on purpose by --other-data",
        )
        return {}
    return {"other_data": {"differences": differences(data_of(arguments.run_dir) or {}, now), "data": now}}
