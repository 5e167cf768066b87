"""Which model families of transformers work: every one of them is tried on a tiny random model (`refreshkv models`)."""
