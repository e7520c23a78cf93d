"""What an experiment compares: arms (ways to make an A-CTR) on splits (days to learn and score)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Literal

from embeddings_store.precision import Precision
from training.recipes import Recipe, complete_journey

Start = Literal["random", "cpm", "continued", "mixed", "ads only"]
"""What A-CTR's parameters are before it sees its ads: drawn at random; CPM's; those of the A-CTR
that was trained on the days before, of which the first was CPM's; the mean of the last two; or the
same without any CPM."""


@dataclass(frozen=True)
class Split:
    """Models are made for the day `asof`, from the days before it, and score first .. last."""

    asof: date
    first: date
    last: date
    per_day: int | None
    """Requests a day; None is all."""


@dataclass(frozen=True)
class Arm:
    """Everything that is chosen about one A-CTR."""

    recipe: Recipe = field(default_factory=complete_journey)
    tpm: bool = True
    last_snapshot: str = "2017-10"
    snapshots: int = 4
    """Monthly snapshots that TPM leaves, up to the last; the first one starts from nothing."""
    start: Start = "cpm"
    links: int = 0
    """How many A-CTRs were trained before this one, each on the days before the next. CPM starts
    from the one before, and at random where there is none."""
    cpm_age_days: int = 0
    """How much older CPM is than A-CTR."""
    mixes: bool = False
    """One network learns natural and ads rows together, instead of one after the other."""
    keeps_statistics: bool = False
    """Whether the normalisation statistics of CPM are carried over."""
    requests_share: float = 1.0
    """Share of the ads requests that are learned from."""
    history_days: int | None = None
    """How far back histories reach; None is as far as the log does."""
    features: str = ""
    """A feature spec in `experiments.features`; empty for the data set's own."""
    reference: str = ""
    """One of `experiments.references`, instead of a network; it learns from the same rows."""
    precision: Precision = "float16"
    """How vectors of windows are stored, in training and in scoring."""
    hides: tuple[str, ...] = ()
    """Windows that are away when scoring: "user", "item"."""

    @property
    def alone(self) -> Arm:
        """The same network without what the other tiers give."""
        return replace(self, tpm=False, start="random")

    def with_network(self, **changes: object) -> Arm:
        """The same with other choices about the network; likewise below."""
        return self._changed("network", changes)

    def with_tpm(self, **changes: object) -> Arm:
        return self._changed("tpm", changes)

    def with_cpm(self, **changes: object) -> Arm:
        return self._changed("cpm", changes)

    def with_actr(self, **changes: object) -> Arm:
        return self._changed("actr", changes)

    def _changed(self, part: str, changes: dict[str, object]) -> Arm:
        changed = replace(getattr(self.recipe, part), **changes)
        return replace(self, recipe=replace(self.recipe, **{part: changed}))


def key(*choices: object) -> str:
    """A short name for a set of choices: equal choices, equal names."""
    return hashlib.sha256(repr(choices).encode()).hexdigest()[:16]
