"""Suites: tables and figures of a paper, measured with other models."""
