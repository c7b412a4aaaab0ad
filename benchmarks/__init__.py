"""Speed benchmarks of flowfactor: ``python -m benchmarks``."""
