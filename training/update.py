"""The daily update: trains the tiers that are due, exports, and promotes what may go live.

Each step leaves its result in one rename and is skipped where the result is there, so an update
that was killed is simply run again, and a second run of the same day changes nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path

import polars as pl

from bundle.manifest import Manifest, refusals
from bundle.spec import Domain
from embeddings_store import PackedWindow, Store, window_months
from training.actr import FULL, actr_days, newest_cpm, train_actr
from training.checks import check_inputs
from training.config import Schedule
from training.cpm import train_cpm
from training.events import EventLog, days_between
from training.examples import (
    DayCache,
    first_month,
    month_before,
    newest_day,
    partitions,
    window_month,
)
from training.export import export_actr
from training.gates import Gates
from training.recipes import Recipe
from training.tpm import months_until, train_through
from training.workspace import Workspace, WorkspaceError

TIERS = ("tpm", "cpm", "actr")
_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Trained:
    """What a tier learned from, months (TPM) or days, both inclusive, and the CPU seconds of it."""

    first: str
    last: str
    cpu_s: float


@dataclass
class Outcome:
    """What an update did."""

    trained: dict[str, Trained] = field(default_factory=dict)
    """By tier; one that was not due is not there."""
    export_cpu_s: float = 0.0
    """0 where the day's bundle was there already."""
    bundle_id: str | None = None
    """The day's bundle, made now or before; None where A-CTR was not asked for."""
    promoted: bool = False
    """It went live just now."""
    refused: list[str] = field(default_factory=list)
    """Why it may not go live, a gate each."""
    live: str | None = None
    """The bundle that is live afterwards."""
    notes: list[str] = field(default_factory=list)
    """What else an operator wants to know."""

    def lines(self) -> list[str]:
        """All of it in words."""
        said = [f"trained {t} on {d.first} to {d.last}" for t, d in self.trained.items()]
        said += self.notes
        if self.promoted:
            said.append(f"{self.bundle_id} is live now")
        elif self.refused:
            said += [f"{self.bundle_id} is refused, {self.live or 'nothing'} stays live"]
            said += self.refused
        return said or ["nothing to do"]


def run_update(
    workspace: Workspace,
    asof: date,
    recipe: Recipe,
    schedule: Schedule,
    seed: int = 0,
    force: bool = False,
    tiers: Sequence[str] = TIERS,
    allow_missing_days: int = 0,
    store: Store | None = None,
    wait_s: float = 0.0,
    release: str | None = None,
) -> Outcome:
    """Brings `tiers` to where they should be on the day `asof`; all learn from the days before it.

    force: a refused bundle goes live too. allow_missing_days: how many days the log may lack of
    what a tier learns from. store: gets the window as well as the workspace's own store. release: a
    month that was held back and shall be used now.

    Raises:
        WorkspaceError: another process has one of the tiers for longer than `wait_s`; or the log is
            too young for a window; or `release` is not held back.
        InputError: what a tier would learn from is not fit for it.
        DataError: there is no log.
    """
    workspace.log()
    if release and "tpm" not in tiers:
        raise WorkspaceError(f"{release} can only be released where tpm is among the tiers")
    with ExitStack() as held:
        for tier in (tier for tier in TIERS if tier in tiers):
            held.enter_context(workspace.locked(tier, wait_s))
        workspace.keep_lag(schedule.tpm_lag_days)
        _remove_leftovers(workspace, tiers)
        if release and release not in workspace.months():
            workspace.release(release)
        update = _Update(workspace, asof, recipe, schedule, seed, allow_missing_days)
        update.train(tiers)
        if "actr" in tiers:
            update.release(force, store)
        return update.outcome


class TolerantLog(EventLog):
    """A log that lacks some days: they have no rows."""

    def __init__(self, root: Path, missing: Collection[date]) -> None:
        super().__init__(root)
        self._missing = missing

    def rows(self, domain: Domain, first: date, last: date) -> pl.DataFrame:
        """As `EventLog.rows`; the missing days are no error."""
        days = [day for day in days_between(first, last) if day not in self._missing]
        if not days:
            some = partitions(self, domain)[0]
            return super().rows(domain, some, some).clear()
        return pl.concat([super(TolerantLog, self).rows(domain, day, day) for day in days])


@dataclass
class _Update:
    workspace: Workspace
    asof: date
    asked: Recipe
    schedule: Schedule
    seed: int
    allow_missing_days: int
    outcome: Outcome = field(default_factory=Outcome)
    missing: set[date] = field(default_factory=set)

    @cached_property
    def held_out(self) -> date:
        """The newest whole day of ads: A-CTR does not learn from it, so it can be judged by it."""
        yesterday, newest = self.asof - _DAY, newest_day(self.workspace.log(), "ad", self.asof)
        while True:
            first = newest - self.asked.actr.days * _DAY
            missing = self._missing("ad", first, yesterday)
            whole = max(day for day in days_between(first, yesterday) if day not in missing)
            if whole == newest:
                return newest
            # A day whose labels have not arrived; there is a day more to be checked.
            newest = whole

    @cached_property
    def recipe(self) -> Recipe:
        """What was asked for, with `held_out` held out."""
        held_out = (self.asof - self.held_out).days
        return replace(self.asked, actr=replace(self.asked.actr, holdout_days=held_out))

    def train(self, tiers: Sequence[str]) -> None:
        """Trains those of the tiers that are due, after a look at all that they will read."""
        if "cpm" in tiers:
            self._refuse_young_log(self.asof - _DAY)
        if "actr" in tiers:
            self._refuse_young_log(actr_days(self.asof, self.recipe.actr)[1])
        months = self._months_due() if "tpm" in tiers else []
        cpm = "cpm" in tiers and self._cpm_is_due()
        actr = "actr" in tiers and self._actr_is_due()
        if months:
            self._missing("natural", *_days(self._tpm_history(months[0])[0], months[-1]))
        if cpm:
            self._missing("natural", *self._cpm_days())
        if months:
            self._train_tpm(months)
        self._say_stale_window()
        if cpm:
            self._train_cpm()
        if actr:
            self._train_actr()

    def _missing(self, domain: Domain, first: date, last: date) -> list[date]:
        """Days that the log lacks of first .. last, which has been checked."""
        missing = check_inputs(self.workspace.data, domain, first, last, self.allow_missing_days)
        self.missing |= set(missing)
        return missing

    def _refuse_young_log(self, newest: date) -> None:
        """newest: of the rows to learn from; without a window in any there is none to serve."""
        if window_month(self.workspace, newest) is None:
            month = first_month(self.workspace.log())
            raise WorkspaceError(
                f"{self.asof} is too early: a window needs three months, the first that the log has"
                f" is {month}, and rows to learn from come after them"
            )

    def _months_due(self) -> list[str]:
        """Months without a snapshot, from the first that a row needs on; where there are snapshots
        already from the first of these on, since each continues from the one before it."""
        days = max(self.asked.actr.days + 1, self.asked.cpm.days)
        oldest = self.asof - (days + self.allow_missing_days) * _DAY
        lag = self.workspace.lag_days
        have = self.workspace.months()
        first = min(window_months(month_before(oldest, lag)))
        first = max(first, have[0] if have else first_month(self.workspace.log()))
        due = [m for m in _months(first, month_before(self.asof, lag)) if m not in have]
        # None is trained on one that is held back.
        return due[: next((i for i, m in enumerate(due) if m in self.workspace.held()), None)]

    def _tpm_history(self, month: str) -> list[str]:
        """The months that the snapshot of `month` learns from: it alone where it continues from the
        one before it, otherwise `history_months`, as far as the log has them."""
        continues = self.asked.tpm.alignment == "warm_start"
        if continues and months_until(month, 2)[0] in self.workspace.months():
            return [month]
        first = first_month(self.workspace.log())
        return [m for m in months_until(month, self.asked.tpm.history_months) if m >= first]

    def _train_tpm(self, months: Sequence[str]) -> None:
        for month in months:
            history = self._tpm_history(month)
            config = replace(self.asked.tpm, history_months=len(history))
            with self._timed("tpm", history[0], month):
                trained = train_through(self.reading, month, 1, config, self.seed)
            if not trained:
                break

    def _say_stale_window(self) -> None:
        for month, reasons in self.workspace.held().items():
            self.outcome.notes.append(f"{month} is held back: {'; '.join(reasons)}")
        found = window_month(self.workspace, self.asof)
        expected = month_before(self.asof, self.workspace.lag_days)
        if found != expected:
            self.outcome.notes.append(f"window {found} serves, that of {expected} is not there")

    def _cpm_days(self) -> tuple[date, date]:
        return self.asof - self.asked.cpm.days * _DAY, self.asof - _DAY

    def _cpm_is_due(self) -> bool:
        newest = newest_cpm(self.workspace, self.asof)
        return newest is None or (self.asof - newest).days >= self.schedule.cpm_days

    def _train_cpm(self) -> None:
        with self._timed("cpm", *map(str, self._cpm_days())):
            network, config = self.asked.network, self.asked.cpm
            train_cpm(self.reading, self.asof, network, config, self.seed)

    def _actr_is_due(self) -> bool:
        name = FULL.name(self.asof)
        if not self.workspace.has_model(name):
            return True
        # One that was trained by hand, with nothing held out, can't be compared.
        facts = self.workspace.facts(name, "")
        return [facts["from"], facts["to"]] != self._actr_days()

    def _actr_days(self) -> list[str]:
        return [str(day) for day in actr_days(self.asof, self.recipe.actr)]

    def _train_actr(self) -> None:
        with self._timed("actr", *self._actr_days()):
            network, config = self.recipe.network, self.recipe.actr
            train_actr(self.reading, self.asof, network, config, self.seed)

    def release(self, force: bool, store: Store | None) -> None:
        """Exports the day's A-CTR, unless that has been done, and promotes it if it may be."""
        manifest = self._exported() or self._export(force=False)
        if force and refusals(manifest):
            manifest = self._export(force=True)
        self.outcome.bundle_id, self.outcome.refused = manifest.id, refusals(manifest)
        if not self.outcome.refused:
            packed = self._packed(manifest)
            for one in (self.workspace.store, *([store] if store else [])):
                one.publish(packed)
            if self._may_go_live(manifest):
                self.workspace.registry.promote(manifest.id)
                self.outcome.promoted = True
        current = self.workspace.registry.current()
        self.outcome.live = current.current if current else None

    def _exported(self) -> Manifest | None:
        """The bundle in the registry that was made from the day's A-CTR as it is now; the forced
        one where there is one beside the refused one."""
        facts = self.workspace.facts(FULL.name(self.asof), f"ecdctr update --asof {self.asof}")
        made_from = (f"{self.asof}", facts["from"], facts["to"], facts["cpm"]["name"])
        registry, found = self.workspace.registry, []
        for manifest in map(registry.read, registry.ids()):
            lineage = manifest.lineage
            same = (manifest.asof, lineage.actr_from, lineage.actr_to, lineage.cpm_id)
            # One without gates was exported by hand, and never judged.
            if manifest.gates and made_from == same:
                found.append(manifest)
        return max(found, key=lambda manifest: manifest.forced, default=None)

    def _export(self, force: bool) -> Manifest:
        start, registry = _cpu_s(), self.workspace.registry
        current = registry.current()
        live = registry.path(current.current) if current else None
        gates = Gates(self.reading, self.held_out, self.schedule.gates, live)
        bundle_id = export_actr(self.reading, self.asof, self.recipe, gates, force)
        self.outcome.export_cpu_s += _cpu_s() - start
        return registry.read(bundle_id)

    def _may_go_live(self, manifest: Manifest) -> bool:
        current = self.workspace.registry.current()
        if current is None:
            return True
        if current.current == manifest.id:
            return False
        if current.previous == manifest.id:
            self.outcome.notes.append(f"{manifest.id} was rolled back, and stays so")
            return False
        if self.workspace.registry.read(current.current).asof > manifest.asof:
            self.outcome.notes.append(f"{current.current} of a later day is live, and stays so")
            return False
        return True

    def _packed(self, manifest: Manifest) -> PackedWindow:
        packed = self.workspace.pack(manifest.window.month)
        if packed.ref.build != manifest.window.build:
            raise WorkspaceError(
                f"{manifest.id} needs build {manifest.window.build} of window {packed.ref.window},"
                f" but its snapshots have changed and give {packed.ref.build}"
            )
        return packed

    @cached_property
    def reading(self) -> Workspace:
        """The workspace for those who read the log: they share what they read."""
        if self.workspace.cache:
            return self.workspace
        shared = Workspace(self.workspace.root)
        shared.registry = self.workspace.registry
        log = TolerantLog(self.workspace.data, self.missing)
        shared.cache = DayCache(log, self.asof + _DAY)
        return shared

    @contextmanager
    def _timed(self, tier: str, first: str, last: str) -> Iterator[None]:
        start, before = _cpu_s(), self.outcome.trained.get(tier)
        yield
        cpu_s = _cpu_s() - start
        if before:
            first, cpu_s = before.first, before.cpu_s + cpu_s
        self.outcome.trained[tier] = Trained(first, last, cpu_s)


def _days(first: str, last: str) -> tuple[date, date]:
    """The first and the last day of the months first .. last."""
    after = date.fromisoformat(f"{last}-28") + timedelta(days=4)
    return date.fromisoformat(f"{first}-01"), after - timedelta(days=after.day)


def _months(first: str, last: str) -> list[str]:
    """All months from first to last, both inclusive."""
    years, months = int(last[:4]) - int(first[:4]), int(last[5:]) - int(first[5:])
    return months_until(last, max(12 * years + months + 1, 0))


def _cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _remove_leftovers(workspace: Workspace, tiers: Sequence[str]) -> None:
    """Drafts of runs that were killed: who holds the lock of a tier is alone with them."""
    for tier in tiers:
        for path in (workspace.root / "models").glob(f".{tier}-*"):
            shutil.rmtree(path)
    if "tpm" in tiers:
        for path in (workspace.root / "held").glob(".????-??.*"):
            shutil.rmtree(path)
    if "actr" in tiers:
        for path in workspace.registry.root.glob(".draft-*"):
            shutil.rmtree(path)
        for path in workspace.registry.root.glob(".current-*.json"):
            path.unlink()
