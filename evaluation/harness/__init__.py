"""RefreshKV's strategies in the lm-evaluation-harness (`refreshkv lm-eval --model refreshkv ...`)."""
