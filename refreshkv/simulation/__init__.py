"""The refresh pattern in training: what a step simulates, and `simulate` for your own training loops."""
