"""Benchmarks. They print figures and assert nothing; run them from the repository's root with `python -m`."""
