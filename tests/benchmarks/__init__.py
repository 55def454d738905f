"""Benchmarks: `python -m tests.benchmarks --help`. Times are reported, never asserted."""
