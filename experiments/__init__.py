"""Experiments with flowfactor: what its models learn, and what its files and runs survive. None is of speed."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
