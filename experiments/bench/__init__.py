"""Benchmarks, each a module to run; their records go to experiments/results."""
