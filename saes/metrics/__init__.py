"""Metrics of coders."""
