"""Scores of tasks whose answers the model generates."""
