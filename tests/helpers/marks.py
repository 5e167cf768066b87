"""Marks for parametrized tests."""

import pytest


def slow_unless(quick, cases):
    """Parameters of a test of which some run only with the slow ones: the interpreter takes seconds for each."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def slow_tuples_unless(quick, cases):
    """`slow_unless` for a test with several parameters, each case a tuple of them."""
    return [case if case in quick else pytest.param(*case, marks=pytest.mark.slow) for case in cases]
