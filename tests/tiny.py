"""A tiny data set in the format of the event log: four months and a bit, two dozen users, three
dozen items, both domains; and a recipe that trains all tiers on it in seconds.

Every user has a favourite kind of item, so there is something to learn. Four users are special: see
`SPECIAL`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bundle.spec import read_spec
from training.config import ActrConfig, CpmConfig, FitConfig, NetworkConfig, TpmConfig
from training.cpm import train_cpm
from training.events import days_between
from training.recipes import Recipe
from training.tpm import train_through
from training.vocabulary import fit_vocabulary
from training.workspace import Workspace

FIRST, LAST = date(2016, 12, 1), date(2017, 4, 10)
ASOF = date(2017, 4, 5)
"""Rows of the days before it see two windows, February's and March's."""
MONTHS = ["2016-12", "2017-01", "2017-02", "2017-03"]
KINDS = ["bread", "cheese", "fruit", "soap"]
SLOTS = ["left", "right"]
PAGE_SIZE = 12
AD_NEGATIVES = 4
NATURAL_NEGATIVES = 4
SPECIAL = {
    "late": "u00",  # appears in February
    "quiet": "u01",  # buys, but nothing that is in either domain
    "shy": "u02",  # sees ads every day and takes nothing, ever
    "gone": "u03",  # leaves after January
}

_FIT = FitConfig(batch_size=256, warm_up_steps=5)
RECIPE = Recipe(
    NetworkConfig(hidden=(16, 8), interaction=4, attention=4),
    TpmConfig(
        dim=4,
        history_months=1,
        store_negatives=2,
        catalogue_negatives=2,
        batch_size=256,
        in_batch_size=32,
        # So few months, and the vectors still grow: that is drift.
        max_residual=2.0,
    ),
    CpmConfig(days=7, near_negatives=1.0, catalogue_negatives=1, fit=_FIT),
    ActrConfig(days=14, calibration_days=7, fit=_FIT),
)

FEATURES = """
[[feature]]
name = "user_id"
entity = "user"
kind = "categorical"
encoding = "hash"
buckets = 64
dim = 0
basic = true

[[feature]]
name = "segment"
entity = "user"
kind = "categorical"
encoding = "vocabulary"
dim = 2
basic = true

[[feature]]
name = "user_taken_7d"
entity = "user"
kind = "numeric"
encoding = "log"
count = { source = "behaviour", of = "positive", by = "user_id", days = 7 }

[[feature]]
name = "user_ad_rate_30d"
entity = "user"
kind = "numeric"
encoding = "linear"
count = { source = "ad", of = "positive", per = "impression", by = "user_id", days = 30, \
prior = 0.1, strength = 20.0 }

[[feature]]
name = "history"
entity = "user"
kind = "history"
max_length = 12
attend = 4
match = ["kind"]

[[feature]]
name = "hour"
entity = "context"
kind = "categorical"
encoding = "bucketise"
boundaries = [6, 12, 18]
dim = 2

[[feature]]
name = "page_size"
entity = "context"
kind = "numeric"
encoding = "log"

[[feature]]
name = "item_id"
entity = "item"
kind = "categorical"
encoding = "hash"
buckets = 256
dim = 0
basic = true

[[feature]]
name = "kind"
entity = "item"
kind = "categorical"
encoding = "vocabulary"
dim = 4
basic = true

# Large enough that its optimiser only touches the rows of a batch.
[[feature]]
name = "brand"
entity = "item"
kind = "categorical"
encoding = "hash"
buckets = 20000
dim = 2

# Only requests know it.
[[feature]]
name = "slot"
entity = "item"
kind = "categorical"
encoding = "vocabulary"
dim = 2

[[feature]]
name = "item_taken_30d"
entity = "item"
kind = "numeric"
encoding = "log"
count = { source = "behaviour", of = "positive", by = "item_id", days = 30 }

[[feature]]
name = "item_bought_3d"
entity = "item"
kind = "numeric"
encoding = "log"
count = { source = "natural", of = "positive", by = "item_id", days = 3 }

[[feature]]
name = "item_ad_rate_7d"
entity = "item"
kind = "numeric"
encoding = "linear"
count = { source = "ad", of = "positive", per = "impression", by = "item_id", days = 7, \
prior = 0.1, strength = 20.0 }

[[feature]]
name = "kind_shown_7d"
entity = "item"
kind = "numeric"
encoding = "log"
count = { source = "ad", of = "impression", by = "kind", days = 7 }

[[feature]]
name = "page_same_kind"
entity = "item"
kind = "numeric"
encoding = "log"
"""


@dataclass
class _Draft:
    """Rows of the log while they are made up."""

    ad: list[dict[str, Any]] = field(default_factory=list)
    natural: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    behaviour: list[dict[str, Any]] = field(default_factory=list)


def write_data(root: Path, *, num_users: int = 24, num_items: int = 36, seed: int = 0) -> Path:
    """Writes the data set into `root`, and returns it."""
    rng = np.random.default_rng(seed)
    users = pl.DataFrame(
        {
            "user_id": [f"u{i:02d}" for i in range(num_users)],
            "segment": [(None, "young", "old")[i % 3] for i in range(num_users)],
        }
    )
    items = pl.DataFrame(
        {
            "item_id": [f"i{i:02d}" for i in range(num_items)],
            "kind": [[*KINDS, None][i % 5] for i in range(num_items)],
            "brand": [f"b{i % 7}" for i in range(num_items)],
            "name": [f"item number {i}" for i in range(num_items)],
        }
    )
    pages = _pages(items, rng)
    draft = _Draft()
    for day in days_between(FIRST, LAST):
        for user in range(num_users):
            _visit(draft, rng, day, user, items, pages)
    return _write(root, users, items, pl.DataFrame(pages), draft)


def _pages(items: pl.DataFrame, rng: np.random.Generator) -> list[dict[str, Any]]:
    """A page a week: each with its own items."""
    ids, kinds = items["item_id"].to_list(), items["kind"].to_list()
    pages = []
    for page in range((LAST - FIRST).days // 7 + 1):
        chosen = rng.permutation(len(ids))[:PAGE_SIZE]
        for i in chosen:
            same = sum(kinds[j] == kinds[i] for j in chosen)
            slot = [*SLOTS, None][int(rng.integers(3))]
            pages.append({"page_id": page, "item_id": ids[i], "slot": slot, "page_same_kind": same})
    return pages


def _visit(
    draft: _Draft,
    rng: np.random.Generator,
    day: date,
    user: int,
    items: pl.DataFrame,
    pages: Sequence[dict[str, Any]],
) -> None:
    name = f"u{user:02d}"
    if (name == SPECIAL["late"] and day < date(2017, 2, 1)) or (
        name == SPECIAL["gone"] and day >= date(2017, 2, 1)
    ):
        return
    time = datetime(day.year, day.month, day.day, int(rng.integers(24)), user)
    base = {"date": day, "timestamp": time, "user_id": name, "hour": time.hour}
    number = ((day - FIRST).days * 100 + user) * 2
    ids, kinds = items["item_id"].to_list(), items["kind"].to_list()
    liked = np.array([3.0 if kind == KINDS[user % 4] else 0.3 for kind in kinds])
    liked /= liked.sum()
    if name == SPECIAL["quiet"]:
        draft.behaviour.append({**base, "item_id": ids[int(rng.integers(len(ids)))]})
        return
    if rng.random() < 0.6 and name != SPECIAL["shy"]:
        taken = rng.choice(len(ids), min(2, len(ids)), replace=False, p=liked)
        others = rng.integers(0, len(ids), NATURAL_NEGATIVES * len(taken))
        row = {**base, "request_id": number, "sample_weight": 1.0, "page_size": None, "slot": None}
        row["page_same_kind"] = None
        for item in taken:
            draft.natural.append({**row, "item_id": ids[item], "label": 1})
            draft.behaviour.append({**base, "item_id": ids[item]})
        for item in set(others.tolist()) - set(taken.tolist()):
            draft.natural.append({**row, "item_id": ids[item], "label": 0})
    if rng.random() < 0.5 or name == SPECIAL["shy"]:
        _see_page(draft, rng, {**base, "request_id": number + 1}, liked, ids, pages)


def _see_page(
    draft: _Draft,
    rng: np.random.Generator,
    base: dict[str, Any],
    liked: np.ndarray[Any, np.dtype[np.float64]],
    ids: list[str],
    pages: Sequence[dict[str, Any]],
) -> None:
    """A request: all of the page is seen, and a part of what is not bought gets into the log."""
    number = (base["date"] - FIRST).days // 7
    page = [dict(entry) for entry in pages if entry["page_id"] == number]
    base["page_size"] = len(page)
    draft.requests.append({**base, "page_id": number})
    shy = base["user_id"] == SPECIAL["shy"]
    chance = [0.0 if shy else min(4 * liked[ids.index(e["item_id"])], 0.9) for e in page]
    bought = rng.random(len(page)) < np.array(chance)
    others = np.flatnonzero(~bought)
    kept = rng.permutation(others)[:AD_NEGATIVES]
    weight = max(len(others) / max(len(kept), 1), 1.0)
    for place in [*np.flatnonzero(bought), *kept]:
        entry = {k: v for k, v in page[place].items() if k != "page_id"}
        label = int(bought[place])
        draft.ad.append({**base, **entry, "label": label, "sample_weight": weight})
        if label:
            behaviour = {k: base[k] for k in ("date", "timestamp", "user_id", "hour")}
            draft.behaviour.append({**behaviour, "item_id": entry["item_id"]})


def _write(
    root: Path, users: pl.DataFrame, items: pl.DataFrame, pages: pl.DataFrame, draft: _Draft
) -> Path:
    root.mkdir(parents=True)
    users.write_parquet(root / "users.parquet")
    items.write_parquet(root / "items.parquet")
    pages.write_parquet(root / "pages.parquet")
    requests = pl.DataFrame(draft.requests)
    requests.write_parquet(root / "requests.parquet")
    (root / "features.toml").write_text(FEATURES)
    vocabulary = fit_vocabulary(read_spec(root / "features.toml"), [users, items, pages], {})
    (root / "vocabulary.json").write_text(json.dumps(vocabulary))
    (root / "dataset.json").write_text(json.dumps({"name": "tiny"}))
    ad = _impressions(draft.ad)
    natural = _impressions(draft.natural)
    _write_days(root / "events" / "domain=ad", ad)
    _write_days(root / "events" / "domain=natural", natural)
    behaviour = pl.DataFrame(draft.behaviour).drop("hour")
    _write_days(root / "behaviour", behaviour)
    whole = requests.join(pages, on="page_id")
    for by in ("user_id", "item_id"):
        counts = {
            "ad": _counted(whole, ad.filter(pl.col("label") == 1), by),
            "natural": _counted(*[natural.filter(pl.col("label") == 1)] * 2, by),
            "behaviour": _counted(behaviour, behaviour, by),
        }
        days = [frame.with_columns(source=pl.lit(source)) for source, frame in counts.items()]
        pl.concat(days).write_parquet(root / f"{by.removesuffix('_id')}_days.parquet")
    return root


def _impressions(rows: list[dict[str, Any]]) -> pl.DataFrame:
    types = {
        "label": pl.Int8,
        "sample_weight": pl.Float32,
        "page_size": pl.Int64,
        "slot": pl.String,
        "page_same_kind": pl.Int64,
    }
    frame = pl.DataFrame(rows, infer_schema_length=None).cast(types)  # type: ignore[arg-type]
    return frame.select(sorted(frame.columns))


def _counted(shown: pl.DataFrame, taken: pl.DataFrame, by: str) -> pl.DataFrame:
    impressions = shown.group_by("date", by).agg(impressions=pl.len().cast(pl.Int64))
    positives = taken.group_by("date", by).agg(positives=pl.len().cast(pl.Int64))
    joined = impressions.join(positives, on=["date", by], how="left").fill_null(0)
    return joined.sort("date", by)


def _write_days(folder: Path, frame: pl.DataFrame) -> None:
    for (day,), rows in frame.partition_by("date", as_dict=True, include_key=False).items():
        (folder / f"date={day}").mkdir(parents=True)
        rows.write_parquet(folder / f"date={day}" / "part-0.parquet")


def alter_from(source: Path, target: Path, day: date, *, remove: bool) -> Path:
    """A copy of a data set in which all events of `day` and later are gone, or are others."""
    shutil.copytree(source, target)
    for folder in (target / "events" / "domain=ad", target / "events" / "domain=natural"):
        _alter_days(folder, day, remove)
    _alter_days(target / "behaviour", day, remove)
    for name in ("user_days", "item_days", "requests"):
        path = target / f"{name}.parquet"
        frame = pl.read_parquet(path)
        before, after = frame.filter(pl.col("date") < day), frame.filter(pl.col("date") >= day)
        pl.concat([before] if remove else [before, _altered(after)]).write_parquet(path)
    return target


def _alter_days(folder: Path, day: date, remove: bool) -> None:
    for path in folder.glob("date=*"):
        if path.name < f"date={day}":
            continue
        frame = pl.read_parquet(path / "part-0.parquet", hive_partitioning=False)
        shutil.rmtree(path)
        if not remove:
            path.mkdir()
            _altered(frame).write_parquet(path / "part-0.parquet")


def _altered(frame: pl.DataFrame) -> pl.DataFrame:
    """Other users take other items, and twice as often."""
    changes = []
    for name in ("user_id", "item_id"):
        if name in frame.columns:
            changes.append(pl.col(name).sort().shuffle(seed=5).alias(name))
    for name in ("impressions", "positives"):
        if name in frame.columns:
            changes.append((pl.col(name) * 2 + 3).alias(name))
    if "label" in frame.columns:
        changes.append((1 - pl.col("label")).cast(pl.Int8).alias("label"))
    changed = frame.with_columns(changes)
    return pl.concat([changed, changed]) if "request_id" not in frame.columns else changed


def train_before_ads(workspace: Workspace, recipe: Recipe = RECIPE, seed: int = 0) -> None:
    """Trains TPM and CPM, as they stand on `ASOF`."""
    train_through(workspace, MONTHS[-1], len(MONTHS), recipe.tpm, seed)
    train_cpm(workspace, ASOF, recipe.network, recipe.cpm, seed)


def copy_workspace(source: Workspace, target: Path) -> Workspace:
    """A workspace with the same content, to be changed at will."""
    shutil.copytree(source.root, target)
    return Workspace(target)


def days_before(day: date, num: int) -> list[date]:
    """The `num` days before `day`, oldest first."""
    return [day - timedelta(days=i) for i in range(num, 0, -1)]
