"""Sweeps: a threshold of the similarity schedule, recommended for a model."""
