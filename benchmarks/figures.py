"""What a benchmark found: figures with units, and goals that they meet or not."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One figure; `goal` is empty, and `met` None, where there is none."""

    figure: str
    value: float
    unit: str
    goal: str
    met: bool | None

    def __str__(self) -> str:
        met = {True: "met", False: "NOT met", None: ""}[self.met]
        value = f"{self.value:,.0f}" if abs(self.value) >= 10_000 else f"{self.value:,.5g}"
        return f"{self.figure:<66}{value:>14} {self.unit:<9}{self.goal:<10}{met}".rstrip()


@dataclass
class Figures:
    """The figures of one run, in the order in which they were found."""

    found: list[Figure] = field(default_factory=list)

    def add(
        self,
        figure: str,
        value: float,
        unit: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Notes a figure, and whether it meets its goal, if it has one."""
        goal, met = "", None
        if at_least is not None:
            goal, met = f">= {at_least:,g}", value >= at_least
        if at_most is not None:
            goal, met = f"<= {at_most:,g}", value <= at_most
        self.found.append(Figure(figure, float(f"{value:.6g}"), unit, goal, met))

    @classmethod
    def read(cls, path: Path) -> Figures:
        """What `write` has written."""
        return cls([Figure(**entry) for entry in json.loads(path.read_text())])

    def write(self, path: Path) -> None:
        """A list of {figure, value, unit, goal, met} as JSON; the folder is created."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(figure) for figure in self.found], indent=2))

    def __str__(self) -> str:
        return "\n".join(map(str, self.found))
