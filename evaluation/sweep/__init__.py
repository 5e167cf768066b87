"""Sweep over thresholds of the similarity schedule, and the one recommended for a model."""
