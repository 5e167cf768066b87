"""A store of prompts' keys and values: a prompt that begins like a stored one computes its remaining tokens only.

`store` is the store, `recycling` is what a request does with it. `backend_memory` and `backend_folder` keep the
entries, `index` finds them, `fill` copies them into a cache. Nothing in `refreshkv` below imports this package.
"""
