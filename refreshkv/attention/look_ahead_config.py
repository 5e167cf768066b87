"""Settings of look-ahead queries and of their training."""

from dataclasses import dataclass

from refreshkv.ranges import COUNT, Range, validate_numbers


@dataclass
class LookAheadConfig:
    """Number, size and training of look-ahead queries."""

    queries: int = 2
    """Look-ahead queries m of each key/value head."""
    rank: int = 8
    """Rank of the matrix by which each look-ahead query changes the step's query."""
    weight: float = 1.0
    """Weight of the divergence between a step's scores and the attention after it; the next-token loss has weight 1."""
    measured_steps: int = 16
    """The divergence is computed for at most this many full steps, and as many selecting steps, of each layer and pass,
    evenly spread."""
    learning_rate: float = 1e-3
    """Peak learning rate of the look-ahead queries (in `simulate` the optimizer is yours)."""
    freeze_model: bool = False
    """Whether only the look-ahead queries are trained."""

    def __post_init__(self) -> None:
        numbers = {
            "queries": Range(1, 64),
            "rank": Range(1, 1024),
            "weight": Range(0, 1000),
            "measured_steps": COUNT,
            "learning_rate": Range(0, 1000),
        }
        validate_numbers(self, numbers, "look_ahead.")
