"""Experiments: several ways to train one base model, each several times, compared."""
