"""What stands between a trained bundle and its promotion.

The candidate and the live bundle score the same requests of a day that neither has learned from,
exactly as they would be served: by their own encoder, graph and window. An item table counts up to
the day that its bundle was made for; where that is after the held-out day, a table as of that day
stands in for it, since otherwise the counts would tell what was clicked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bundle.encode import Encoder
from bundle.items import ItemTable
from bundle.manifest import FEATURES, ITEMS, VOCABULARY, Manifest, Verdict, read_manifest
from bundle.spec import read_spec
from embeddings_store import StoreError, WindowRef
from training.config import GatesConfig
from training.events import Ints
from training.examples import Builder, builder_for
from training.metrics import PerUser, has_gauc, interval, measure, pcoc, resample
from training.requests import RequestMaker
from training.scoring import BundleScorer, logits_of
from training.workspace import Workspace

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """What the gates found: a verdict each, and the candidate's figures on the held-out day."""

    verdicts: tuple[Verdict, ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class _HeldOut:
    """Rows of the held-out day: label float32 [n] and user int64 [n], and the logits float64 [n] of
    the candidate, and of the live bundle where there is one that scores them."""

    label: npt.NDArray[np.float32]
    user: Ints
    candidate: Floats
    live: Floats | None


class Gates:
    """Judges candidates by one held-out day."""

    def __init__(
        self, workspace: Workspace, day: date, config: GatesConfig, live: Path | None
    ) -> None:
        """day: held out of what both the candidate and the bundle in the folder `live` learned."""
        self._workspace, self._day, self._config, self._live = workspace, day, config, live

    def judge(self, draft: Path, manifest: Manifest, correction: float = 0.0) -> Judged:
        """Judges the bundle-to-be in `draft`, whose manifest is not sealed yet.

        correction: what the held-out day has added to the logits; it is taken off again, so that
            the day judges only what knows nothing of it.
        """
        verdicts = [self._window(manifest), self._signature(manifest)]
        if not verdicts[0].passed:
            return Judged(tuple(verdicts), {})
        held_out = self._held_out(draft, manifest, correction)
        finite = _finite(held_out.candidate)
        verdicts.append(finite)
        if not finite.passed:
            return Judged(tuple(verdicts), {})
        verdicts += [_spread(held_out.candidate, self._config), *self._quality(held_out)]
        return Judged(tuple(verdicts), _figures(held_out))

    def _window(self, manifest: Manifest) -> Verdict:
        window = manifest.window
        ref, detail = WindowRef(window.month, window.build), ""
        try:
            self._workspace.store.check(ref)
            if (packed := self._workspace.pack(window.month).ref) != ref:
                detail = f"the snapshots now give build {packed.build}"
        except (StoreError, ValueError) as error:
            detail = str(error)
        return Verdict("window", not detail, None, f"{ref}, complete in the store", detail)

    def _signature(self, manifest: Manifest) -> Verdict:
        limit = "the inputs of the live bundle"
        if self._live is None:
            return Verdict("signature", True, None, limit, "nothing is live")
        live, own = map(_signature, (read_manifest(self._live), manifest))
        changed = sorted(n for n in live.keys() | own.keys() if live.get(n) != own.get(n))
        passed = not changed or self._config.allow_signature_change
        return Verdict(
            "signature", passed, len(changed), limit, f"differ: {', '.join(changed) or 'none'}"
        )

    def _held_out(self, draft: Path, manifest: Manifest, correction: float) -> _HeldOut:
        workspace, day = self._workspace, self._day
        log = workspace.log()
        builder = builder_for(workspace, log, day, day, with_tpm=False)
        requests, rows = RequestMaker(log, builder, day).whole(self._config.requests)

        def scored(folder: Path, about: Manifest) -> Floats:
            reader = workspace.store.open_now(WindowRef(about.window.month, about.window.build))
            scorer = self._scorer(folder, about, builder)
            return logits_of(scorer.score_all(reader, requests))

        live = self._live
        return _HeldOut(
            rows["label"].to_numpy().astype(np.float32),
            log.users.rows(rows["user_id"].to_numpy()),
            scored(draft, manifest) - correction,
            scored(live, read_manifest(live)) if live else None,
        )

    def _scorer(self, folder: Path, manifest: Manifest, builder: Builder) -> BundleScorer:
        """The bundle's scores; its counts are as of the held-out day at most."""
        items, is_own = ItemTable.read(folder / ITEMS), manifest.asof <= str(self._day)
        if not is_own:
            log = builder.log
            numbers = builder.item_numbers(self._day)
            items = ItemTable.build(log.items.keys, log.items.categorical, numbers)
        vocabulary = json.loads((folder / VOCABULARY).read_text())
        encoder = Encoder(read_spec(folder / FEATURES), vocabulary, items)
        return BundleScorer(encoder, folder, own_items=is_own)

    def _quality(self, held_out: _HeldOut) -> Iterator[Verdict]:
        label, config = held_out.label, self._config
        low, high = config.pcoc_band
        limit = f"within {low} and {high}"
        if not label.any() or label.all():
            yield Verdict("pcoc", True, None, limit, f"{self._day} has one class only")
            return
        found = pcoc(held_out.candidate, label)
        yield Verdict("pcoc", low <= found <= high, found, limit)
        if held_out.live is None or not np.isfinite(held_out.live).all():
            why = "nothing is live" if held_out.live is None else "live scores are not finite"
            yield Verdict("gauc", True, None, "as good as the live bundle's", why)
            yield Verdict("log_loss", True, None, "as good as the live bundle's", why)
            return
        yield from self._compared(held_out, held_out.live)

    def _compared(self, held_out: _HeldOut, live: Floats) -> Iterator[Verdict]:
        """Refuses what is worse by more than the tolerance, and surely so: the whole 95 % interval
        of the paired difference (bootstrap over users) lies on the wrong side of zero. Either alone
        would refuse by chance, for a day has a hundred positives or two."""
        own, other = (
            PerUser.of([logits], held_out.label, held_out.user)
            for logits in (held_out.candidate, live)
        )
        times, once = resample(len(own.impressions)), np.ones((1, len(own.impressions)))
        config, before = self._config, float(other.log_loss(once)[0])
        higher = interval(own.log_loss(times) / other.log_loss(times) - 1.0)
        rise = float(own.log_loss(once)[0]) / before - 1.0
        yield Verdict(
            "log_loss",
            not (rise > config.log_loss_tolerance and higher[0] > 0),
            rise,
            f"at most {config.log_loss_tolerance:.1%} above the live bundle's",
            f"95 % interval {higher[0]:+.2%} to {higher[1]:+.2%}",
        )
        if not has_gauc(held_out.label, held_out.user):
            yield Verdict("gauc", True, None, "as good as the live bundle's", "no user clicked")
            return
        lower = interval(own.gauc(times) - other.gauc(times))
        change = float((own.gauc(once) - other.gauc(once))[0])
        yield Verdict(
            "gauc",
            not (change < -config.gauc_tolerance and lower[1] < 0),
            change,
            f"at most {config.gauc_tolerance} below the live bundle's",
            f"95 % interval {lower[0]:+.4f} to {lower[1]:+.4f}",
        )


def _finite(logits: Floats) -> Verdict:
    bad = int(np.count_nonzero(~np.isfinite(logits)))
    return Verdict("finite", not bad, bad, "0 scores that are not finite", f"of {len(logits)}")


def _spread(logits: Floats, config: GatesConfig) -> Verdict:
    spread = float(np.std(logits))
    limit = f"at least {config.min_spread}"
    return Verdict("spread", spread >= config.min_spread, spread, limit)


def _figures(held_out: _HeldOut) -> dict[str, float]:
    """The candidate's metrics; empty where a class is missing and none is defined."""
    if not has_gauc(held_out.label, held_out.user):
        return {}
    found = measure(held_out.candidate, held_out.label, held_out.user)
    return {name: getattr(found, name) for name in ("gauc", "auc", "log_loss", "pcoc")}


def _signature(manifest: Manifest) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    """Type and shape of each input of both graphs. How wide an item's part is depends on the sizes
    of the network, and matters to nobody outside the bundle."""
    inputs = [one for one in (*manifest.inputs, *manifest.item_inputs) if one.name != "item_part"]
    return {one.name: (one.dtype, one.shape) for one in inputs}
