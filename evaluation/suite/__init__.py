"""Suites: tables and figures of a paper, measured for other models."""
