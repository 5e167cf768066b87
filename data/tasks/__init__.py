"""Long-context tasks: `registry` names them, `task` builds prompts of a given length, `rows` makes training rows.

One file per family; each says which benchmark it follows, and where it departs.
"""
