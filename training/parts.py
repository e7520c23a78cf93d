"""Training rows in parts of a few weeks, of which one is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial

import numpy as np

from training.events import EventLog, days_between
from training.examples import Builder, Examples, builder_for, concatenate
from training.workspace import Workspace


class Parts:
    """Parts of a run's rows, oldest first; one is built when it is asked for, and kept until
    another one is."""

    def __init__(self, builds: Sequence[Callable[[], Examples]]) -> None:
        self._builds = builds
        self._built: tuple[int, Examples] | None = None

    def __len__(self) -> int:
        return len(self._builds)

    def __getitem__(self, number: int) -> Examples:
        if self._built is None or self._built[0] != number:
            # Before the next one is built, not after: there is never memory for two.
            self._built = None
            self._built = number, self._builds[number]()
        return self._built[1]

    @property
    def newest(self) -> Examples:
        return self[len(self) - 1]

    def after(self, builds: Sequence[Callable[[], Examples]]) -> Parts:
        """The same behind older parts; what is built stays."""
        whole = Parts([*builds, *self._builds])
        if self._built is not None:
            whole._built = self._built[0] + len(builds), self._built[1]
        return whole

    def since(self, day: date) -> Examples:
        """The rows dated on or after `day`, from as many of the newest parts as have any."""
        found: list[Examples] = []
        for number in reversed(range(len(self))):
            found.insert(0, self[number].since(day))
            if len(found[0]) < len(self[number]):
                break
        return found[0] if len(found) == 1 else concatenate(found)


@dataclass(frozen=True)
class Span:
    """Days, both inclusive."""

    first: date
    last: date

    def split(self, most: int) -> list[Span]:
        """As few spans as have at most `most` days each, all about as long."""
        days = days_between(self.first, self.last)
        numbers = np.array_split(np.arange(len(days)), math.ceil(len(days) / most))
        return [Span(days[part[0]], days[part[-1]]) for part in numbers]


def parts_of_days(
    workspace: Workspace,
    log: EventLog,
    span: Span,
    most: int,
    build: Callable[[Span, Builder], Examples],
    with_tpm: bool,
) -> Parts:
    """A span's rows in parts of at most `most` days. Each part has a builder of its own, so that
    the windows of its days are let go of with it."""
    spans = span.split(most)

    def made(part: Span, window_dim: int | None = None) -> Examples:
        builder = builder_for(workspace, log, part.first, part.last, with_tpm, window_dim)
        return build(part, builder)

    # Days from before there was any window say nothing of its size; the newest ones do.
    parts = Parts([partial(made, spans[-1])])
    dim = parts.newest.window_dim
    return parts.after([partial(made, part, dim) for part in spans[:-1]])
