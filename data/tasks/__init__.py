"""Long-context tasks: `registry` names them, `task` builds prompts of a given length, `rows` makes training sequences.

Each family has a file that names the benchmark it follows and the differences.
"""
