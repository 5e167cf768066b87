"""The refresh pattern in training: what a step simulates, and `simulate` for trainers of one's own."""
