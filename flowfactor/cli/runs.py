"""``flowfactor demo``, ``evaluate`` and ``traverse``: what is done with runs."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from flowfactor.cli.errors import USER_ERRORS, fail
from flowfactor.cli.train import report, table
from flowfactor.errors import require
from flowfactor.training._folder import ANIMATION, EVALUATION, TRAVERSAL
from flowfactor.training._process import prepare_process
from flowfactor.training.config import Config, load_config


def run_demo(arguments: argparse.Namespace) -> int:
    """Trains the demo's model, and draws it.

    Args:
        arguments: Its arguments.

    Returns:
        The exit code.
    """
    prepare_process()
    try:
        config = load_config("demo")
        values = config.as_dict() | {"seed": arguments.seed, "output": str(arguments.output or config.output)}
        if arguments.minutes is not None:
            values["train"]["minutes"] = arguments.minutes
        config = Config.from_dict(values)
        for module in ("matplotlib", "PIL.Image"):
            require(module, extra="plot")
        from flowfactor.training import prepare

        run = prepare(config, overwrite=True)
    except USER_ERRORS as error:
        fail("demo", error)
    minutes = config.train.minutes or 0
    print(f"training on {len(run.data.dataset):,} handwritten digits for {minutes:g} minutes ...", file=sys.stderr)
    code = report(run.fit(), config.output)
    if code == 0:
        folder = run.folder
        draw(run.model, run.test, folder / TRAVERSAL, folder / ANIMATION)
        print(
            f"""
look at {folder / TRAVERSAL}: every row follows one flow from a test digit;
{folder / ANIMATION} shows the same in motion.

what to try next
  flowfactor demo --minutes 10
  flowfactor evaluate {folder}
  flowfactor train demo --model.field gradient --output runs/gradient    # without the divergence-free part
  flowfactor train mnist-small --data.root DIR                           # coloured MNIST in 20 minutes"""
        )
    return code


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Measures the model of a run.

    Args:
        arguments: Its arguments.

    Returns:
        The exit code.
    """
    try:
        if arguments.samples < 0 or (arguments.limit is not None and arguments.limit < 1):
            raise ValueError("--samples must not be negative, and --limit must be at least 1")
        model, config = _opened(arguments)
        test = config.data.dataset("test")
        from flowfactor.training._folder import write_text
        from flowfactor.training.evaluation import evaluate, knows_transformations
        from flowfactor.training.run import versions

        # Models without transformations get theirs searched on training data.
        train = None if knows_transformations(model) else config.data.dataset("train")
        other = _checked_data(arguments, test, train)
    except USER_ERRORS as error:
        fail("evaluate", error)

    count = None if arguments.limit is None else arguments.limit * test.num_flows
    without = arguments.samples == 0
    result = evaluate(
        model,
        test,
        train=train,
        limit=arguments.limit,
        likelihood_limit=0 if without else count,
        samples=arguments.samples or 1,
    )
    path = arguments.run_dir / EVALUATION
    write_text(path, json.dumps(result | other | {"versions": versions()}, indent=2) + "\n")
    print(f"{table(result)}\n\nwritten to {path}")
    return 0


def run_traverse(arguments: argparse.Namespace) -> int:
    """Draws test images along every flow of a run's model.

    Args:
        arguments: Its arguments.

    Returns:
        The exit code.
    """
    picture, animation = arguments.output or arguments.run_dir / TRAVERSAL, arguments.gif
    try:
        for path, suffix in ((picture, ".png"), (animation, ".gif")):
            if path is not None and (path.suffix != suffix or not path.parent.is_dir()):
                raise ValueError(f"{path} must end in {suffix} and lie in a folder that exists")
        model, config = _opened(arguments)
        test = config.data.dataset("test")
        _checked_data(arguments, test)
        if not 1 <= arguments.images <= len(test) or (arguments.steps is not None and arguments.steps < 1):
            raise ValueError(f"--images must be between 1 and {len(test)}, and --steps at least 1")
        if arguments.back < 0:
            raise ValueError(f"--back must not be negative, got {arguments.back}")
        for module in ("matplotlib", "PIL.Image"):
            require(module, extra="plot")
    except USER_ERRORS as error:
        fail("traverse", error)
    draw(model, test, picture, animation, images=arguments.images, steps=arguments.steps, back=arguments.back)
    print("\n".join(str(path) for path in (picture, animation) if path is not None))
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

    x0 = test.batch(_spread(images, len(test)))["frames"][:, 0]
    reach = test.num_steps if steps is None else steps
    whole = list(range(-back, reach + 1))
    halves = [half / 2 for half in range(-2 * back, 2 * reach + 1)]
    names = flow_names(model, test)
    plot.save(plot.traverse_figure(model, x0, t=whole, flow_names=names), picture)
    if animation is not None:
        plot.to_gif(plot.traversal_frames(model, x0, t=halves, scale=2), animation)


def _spread(count: int, total: int) -> list[int]:
    """Different indices below ``total``, about as far apart as can be.

    Equal distances would divide a grid of factors evenly, and show the same state of most of them.
    """
    stride = next(step for step in range(max(1, round(0.618 * total)), total + 2) if math.gcd(step, total) == 1)
    return [(index + 1) * stride % total for index in range(count)]


def _opened(arguments: argparse.Namespace) -> tuple[Any, Config]:
    """Loads the model of a run, and its settings."""
    from flowfactor.training import load_run

    model, config = load_run(arguments.run_dir)
    if arguments.root is not None:
        config.data.root = arguments.root
    return model, config


def _checked_data(arguments: argparse.Namespace, test: Any, train: Any = None) -> dict[str, Any]:
    """Checks that data are those of the run, or says in what they differ where the user asked for others."""
    from flowfactor.training._identity import check_data, data_of, differences

    now = {name: data.fingerprint() for name, data in (("test", test), ("train", train)) if data is not None}
    if not arguments.other_data:
        check_data(
            arguments.run_dir,
            now,
            "give the folder of its own data by --root, or take these on purpose by --other-data",
        )
        return {}
    return {"other_data": {"differences": differences(data_of(arguments.run_dir) or {}, now), "data": now}}
