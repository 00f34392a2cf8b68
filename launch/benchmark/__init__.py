"""Measures this library's loss and others: `python -m launch.benchmark run | table | plot`."""
