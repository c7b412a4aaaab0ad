"""Names of the files in the folders of runs and benchmarks."""

from __future__ import annotations

CONFIG, CHECKPOINT, MODEL, METRICS, TENSORBOARD = "config.yaml", "last.ckpt", "model", "metrics.csv", "tensorboard"
RESULT, EVALUATION, TRAVERSAL, ANIMATION = "result.json", "evaluation.json", "traversal.png", "transformations.gif"
"""In the folder of any run; those of the second line say what its model does."""

SETTINGS, FIGURES, ERROR, LOG = "settings.json", "benchmark.json", "error.txt", "log.txt"
"""In the folder of a benchmark's run, beside those of any run."""

REPORT, FIGURE = "report.md", "report.png"
"""In the folder of a benchmark."""
