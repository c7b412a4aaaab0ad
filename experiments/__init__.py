"""Experiments with flowfactor: what its models learn, and what its files and runs survive. None is of speed."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"

EULER = Path(__file__).parent / "euler" / "mnist.yaml"
"""The settings of a Helmholtz field that is trained by unit Euler steps."""
