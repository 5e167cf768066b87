"""Path traversal: write the only route between two cities (LongProc, Ye et al., COLM 2025, arXiv 2501.05414)."""

from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from refreshkv.data.tasks.family import Family, Problem
from refreshkv.data.tasks.scoring import between_tags, leading_matches
from refreshkv.data.tasks.template import Template
from refreshkv.data.tasks.words import coined_words
from refreshkv.settings import SettingsError

TRANSITS = ("bus", "train", "plane", "ferry")


@dataclass(frozen=True)
class PathTraversal(Family):
    """Size: cities. Each has one connection to another city; several may lead to the same one."""

    max_new_tokens: int = 1024
    """Tokens that may be generated."""
    steps: int = 10
    """Connections on the route."""

    template: ClassVar[Template] = {
        "city": "From {city}, the {transit} goes to {other}.",
        "step": "From {city}, take a {transit} to {other}.",
        "prompt": (
            "In an imaginary country, each city has exactly one connection, one way only, to one other city:\n\n"
            "{context}\n\nGive the route from {start} to {goal}: begin at {start} and look up the next city until you "
            "are there. Write one line for each connection, all of them between <Route> and </Route>, such as\n"
            "<Route>\nFrom {start}, take a ... to ...\n</Route>\n\nThe route from {start} to {goal}:\n"
        ),
        "answer_prefix": "",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise SettingsError(f"steps must be a whole number >= 1, got {self.steps}")

    @property
    def least_size(self) -> int:
        return self.steps + 1

    def draw(self, random: Random, size: int, index: int, template: Template) -> Problem:
        cities = [word.capitalize() for word in coined_words(random, size)]
        route, others = cities[: self.steps + 1], cities[self.steps + 1 :]
        targets = dict(zip(route, route[1:], strict=False))
        for city in [route[-1], *others]:
            targets[city] = _other(random, cities, city)
        connections = {city: (random.choice(TRANSITS), target) for city, target in targets.items()}
        listed = random.sample(cities, size)
        return Problem(
            fields={
                "context": "\n".join(_line(template["city"], city, connections) for city in listed),
                "start": route[0],
                "goal": route[-1],
            },
            answer="\n".join(
                ["<Route>", *(_line(template["step"], city, connections) for city in route[:-1]), "</Route>"]
            ),
            references=[_line(template["step"], city, connections) for city in route[:-1]],
        )

    def score(self, prediction: str, references: Any) -> dict[str, float]:
        """As `route_scores`."""
        return route_scores(prediction, references)


def route_scores(prediction: str, route: list[str]) -> dict[str, float]:
    """score: LongProc's accuracy, 1 for the whole route, else 0. partial: the share of leading right lines."""
    found = between_tags(prediction, "Route")
    lines = [] if found is None else found.split("\n")
    return {"score": float(lines == route), "partial": leading_matches(lines, route) / len(route)}


def _other(random: Random, cities: list[str], city: str) -> str:
    index = random.randrange(len(cities) - 1)
    return cities[index] if cities[index] != city else cities[-1]


def _line(template_part: str, city: str, connections: dict[str, tuple[str, str]]) -> str:
    transit, other = connections[city]
    return template_part.format(city=city, transit=transit, other=other)
