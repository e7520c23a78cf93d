"""A world whose true click probabilities are known: users and items with tastes that drift.

A click is drawn from sigmoid(base + strength * taste + popularity + hour) times the chance that its
position is looked at. Natural content and ads share users and items; how alike the tastes behind
their clicks are is `correlation`. Whoever learns from the log can be held against
`best_possible`: no model can do better than the probabilities that the clicks were drawn from.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.optimize import brentq
from scipy.special import expit, logit

from bundle.spec import Domain, read_spec
from training.events import EventLog, days_between
from training.metrics import Metrics, measure
from training.parallel import progress
from training.vocabulary import fit_vocabulary

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_DIM = 8
_RANGES: dict[str, tuple[float, float]] = {
    "users": (10, 1e6),
    "items": (20, 1e5),
    "page_size": (2, 1000),
    "drift": (0, 1),
    "correlation": (-1, 1),
    "ad_requests": (0.001, 1),
    "natural_requests": (0.001, 1),
    "ad_rate": (1e-4, 0.5),
    "natural_rate": (1e-4, 0.5),
    "cold_share": (0, 0.5),
    "cold_days": (0, 1e4),
    "ads_only_share": (0, 0.5),
    "explained": (0, 1),
    "position_bias": (0, 3),
    "strength": (0, 10),
    "ad_negatives": (1, 1000),
}


@dataclass(frozen=True)
class SyntheticConfig:
    """A world. ValueError where a value is out of its range."""

    users: int = 2000
    items: int = 1000
    first: date = date(2017, 1, 1)
    last: date = date(2017, 11, 14)
    page_size: int = 20
    """Candidates of a request, in either domain."""
    drift: float = 0.3
    """Share of a taste's length that is new every month; 0 stands still."""
    correlation: float = 0.8
    """Between the tastes (and popularity) behind natural and ads clicks."""
    natural_requests: float = 0.3
    """Of a user, a day."""
    ad_requests: float = 0.15
    natural_rate: float = 0.1
    """Clicks per impression on an average day."""
    ad_rate: float = 0.02
    cold_share: float = 0.1
    """Of users, and of items: those that appear only in the last `cold_days`."""
    cold_days: int = 60
    ads_only_share: float = 0.05
    """Of items: those that natural content never has."""
    explained: float = 0.5
    """Share of an item's taste that its category and brand explain, of a user's its segment."""
    position_bias: float = 0.5
    """Position p is looked at with chance p ** -position_bias."""
    strength: float = 2.5
    """How much taste decides."""
    ad_negatives: int = 5
    """Of a page, that get into the log of ads; their weight says how many they stand for."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value}, must be within {low:g} and {high:g}")
        if self.first > self.last:
            raise ValueError(f"last is {self.last}, must not be before first, {self.first}")
        if self.page_size > self.items // 2:
            half = self.items // 2
            raise ValueError(
                f"page_size is {self.page_size}, must be at most {half}, half of items"
            )


@dataclass(frozen=True)
class SyntheticSummary:
    """Rows of the log, and of the pages behind the ads."""

    natural_rows: int
    ad_rows: int
    ad_impressions: int
    ad_positives: int


def write_synthetic(target: Path, config: SyntheticConfig) -> SyntheticSummary:
    """Writes the data set of a world into `target`, which appears only when it is complete; the
    same config gives the same log. Beside the log, `truth/domain=.../date=...` has the probability
    that each click was drawn from: request_id, item_id, true_probability."""
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        summary = _Writer(draft, config).write()
        about = {"name": "synthetic", **asdict(config), **asdict(summary)}
        (draft / "dataset.json").write_text(json.dumps(about, indent=2, default=str))
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return summary


def best_possible(root: Path, first: date, last: date, per_day: int | None = None) -> Metrics:
    """What the true probabilities score on the requests that an evaluation of these days uses."""
    log, days = EventLog(root), days_between(first, last)
    rows = log.full_lists(days, per_day)
    paths = [root / "truth" / "domain=ad" / f"date={day}" / "part-0.parquet" for day in days]
    truth = pl.concat([pl.read_parquet(path, hive_partitioning=False) for path in paths])
    joined = rows.join(truth, on=["request_id", "item_id"], how="left", maintain_order="left")
    return measure(
        logit(joined["true_probability"].to_numpy()),
        rows["label"].to_numpy().astype(np.float32),
        log.users.rows(rows["user_id"].to_numpy()),
    )


@dataclass(frozen=True)
class _Tastes:
    """Tastes of some: the sum of what each one's kinds say and of a part of one's own, all of
    which drift. kinds: float64 [..., K, D] each, of: int64 [num] each, own: float64 [..., num, D].
    """

    explained: float
    kinds: list[Floats]
    of: list[Ints]
    own: Floats

    def now(self) -> Floats:
        """float64 [..., num, D]; each number has a variance of 1."""
        shared = np.sum([k[..., o, :] for k, o in zip(self.kinds, self.of, strict=True)], axis=0)
        shared = shared / np.sqrt(len(self.kinds))
        tastes: Floats = np.sqrt(self.explained) * shared + np.sqrt(1 - self.explained) * self.own
        return tastes

    def drift(self, share: float, rng: np.random.Generator) -> None:
        """A month passes."""
        for part in (*self.kinds, self.own):
            part *= np.sqrt(1 - share * share)
            part += share * rng.normal(size=part.shape)


class _World:
    """Who and what there is, and how it feels about each other in the current month."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        rng = self.rng = np.random.default_rng(config.seed)
        self.segment, self.category, self.brand = (
            rng.integers(0, kinds, num)
            for kinds, num in ((4, config.users), (20, config.items), (50, config.items))
        )
        # Two tastes of a user: for natural content, and what else there is for ads.
        self._users = self._tastes((2, config.users), {4: self.segment})
        self._items = self._tastes((config.items,), {20: self.category, 50: self.brand})
        self._user, self._item = self._users.now(), self._items.now()
        # A power law: the logarithm of a rank.
        self._popularity = -np.log(
            1 + rng.permuted(np.tile(np.arange(config.items), (2, 1)), axis=1)
        )
        self.user_from, self.item_from = (
            np.where(
                rng.random(num) < config.cold_share, self._cold_from(), config.first.toordinal()
            )
            for num in (config.users, config.items)
        )
        self.ads_only = rng.random(config.items) < config.ads_only_share
        self._refuse_few_items()
        self._base = {domain: self._calibrated(domain) for domain in ("natural", "ad")}

    def drift(self) -> None:
        """A month passes."""
        for tastes in (self._users, self._items):
            tastes.drift(self.config.drift, self.rng)
        self._user, self._item = self._users.now(), self._items.now()

    def probability(
        self, domain: Domain, user: Ints, item: Ints, position: Ints, hour: Ints
    ) -> Floats:
        """True probabilities float64 [R, P] of requests [R] of items [R, P]."""
        return self._chance(domain, user, item, hour) * self._looked_at(position)

    def candidates(self, domain: Domain, day: date, num: int) -> Ints:
        """Distinct items int64 [num, page_size], popular ones more often, in a random order."""
        known = self.item_from <= day.toordinal()
        if domain == "natural":
            known &= ~self.ads_only
        weight = np.where(known, 0.5 * self._liked(domain), -np.inf)
        drawn = weight + self.rng.gumbel(size=(num, len(weight)))
        size = self.config.page_size
        return self.rng.permuted(np.argpartition(-drawn, size, axis=1)[:, :size], axis=1)

    def _refuse_few_items(self) -> None:
        first, size = self.config.first.toordinal(), self.config.page_size
        known = int((~self.ads_only & (self.item_from <= first)).sum())
        if size > known:
            raise ValueError(
                f"page_size is {size}, must be at most {known}: so many items does natural content"
                " have on the first day"
            )

    def _cold_from(self) -> int:
        return self.config.last.toordinal() - self.config.cold_days + 1

    def _tastes(self, shape: tuple[int, ...], of: dict[int, Ints]) -> _Tastes:
        """of: the kind int64 [num] of each one, by how many kinds there are."""
        drawn = [self.rng.normal(size=(*shape[:-1], num, _DIM)) for num in of]
        own = self.rng.normal(size=(*shape, _DIM))
        return _Tastes(self.config.explained, drawn, list(of.values()), own)

    def _mixed(self, both: Floats, domain: Domain) -> Floats:
        c = self.config.correlation if domain == "ad" else 1.0
        mixed: Floats = c * both[0] + np.sqrt(1 - c * c) * both[1]
        return mixed

    def _liked(self, domain: Domain) -> Floats:
        return self._mixed(self._popularity, domain)

    def _chance(self, domain: Domain, user: Ints, item: Ints, hour: Ints) -> Floats:
        score = self._score(domain, user, item, hour) + self._base[domain]
        chance: Floats = np.clip(expit(score), 1e-9, 1 - 1e-9)
        return chance

    def _score(self, domain: Domain, user: Ints, item: Ints, hour: Ints) -> Floats:
        taste = self._mixed(self._user[:, user], domain)
        dots = np.einsum("rd,rpd->rp", taste, self._item[item]) / _DIM
        evening = 0.3 * np.sin((hour - 14) / 24 * 2 * np.pi)
        popular = 0.3 * self._liked(domain)[item]
        score: Floats = self.config.strength * dots + popular + evening[:, None]
        return score

    def _looked_at(self, position: Ints) -> Floats:
        chance: Floats = position.astype(np.float64) ** -self.config.position_bias
        return chance

    def _calibrated(self, domain: Domain) -> float:
        """The base at which a page is clicked as often as the config says."""
        config = self.config
        rate: float = getattr(config, f"{domain}_rate")
        user = self.rng.integers(0, config.users, 500)
        item, hour = self.candidates(domain, config.last, 500), self.rng.integers(0, 24, 500)
        score = self._score(domain, user, item, hour)
        seen = self._looked_at(np.arange(1, config.page_size + 1))
        most = float(seen.mean())
        if rate >= most:
            raise ValueError(
                f"{domain}_rate is {rate}, must be below {most:.3g}: positions hide more"
            )

        def excess(base: float) -> float:
            return float((expit(score + base) * seen).mean()) - rate

        return float(brentq(excess, -60.0, 60.0))


class _Writer:
    """Plays the world day by day, and writes what happened."""

    def __init__(self, root: Path, config: SyntheticConfig) -> None:
        self._root, self._config, self._world = root, config, _World(config)
        self._number = 0
        self._requests: list[pl.DataFrame] = []
        self._pages: list[pl.DataFrame] = []
        self._days: dict[str, list[pl.DataFrame]] = {"user_id": [], "item_id": []}

    def write(self) -> SyntheticSummary:
        users, items = self._entities()
        users.write_parquet(self._root / "users.parquet")
        items.write_parquet(self._root / "items.parquet")
        rows = np.zeros(4, np.int64)
        days = days_between(self._config.first, self._config.last)
        for day in progress(days, "synthetic", unit="day"):
            if day.day == 1 and day != days[0]:
                self._world.drift()
            rows += self._day(day)
        pl.concat(self._requests).write_parquet(self._root / "requests.parquet")
        pl.concat(self._pages).write_parquet(self._root / "pages.parquet")
        for by, frames in self._days.items():
            name = by.removesuffix("_id")
            frame = pl.concat(frames).sort("source", "date", by)
            frame.write_parquet(self._root / f"{name}_days.parquet")
        spec = self._root / "features.toml"
        shutil.copy(Path(__file__).with_suffix(".toml"), spec)
        vocabulary = fit_vocabulary(read_spec(spec), [users, items], {})
        (self._root / "vocabulary.json").write_text(json.dumps(vocabulary, indent=1))
        return SyntheticSummary(*rows.tolist())

    def _entities(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        world = self._world
        users = {"user_id": _names("u", len(world.segment)), "segment": _names("s", world.segment)}
        items = {
            "item_id": _names("i", len(world.category)),
            "category": _names("c", world.category),
            "brand": _names("b", world.brand),
            "name": _names("item ", len(world.category)),
        }
        return pl.DataFrame(users), pl.DataFrame(items)

    def _day(self, day: date) -> Ints:
        """Rows of natural content and of ads, impressions and positives of ads."""
        natural, ads = self._domain("natural", day), self._domain("ad", day)
        taken = pl.concat([f.filter(pl.col("label") == 1) for f in (natural, ads)])
        _write(self._root / "behaviour", day, taken.select("user_id", "item_id", "timestamp"))
        logged = self._sampled(ads)
        for domain, whole, rows in (("natural", natural, natural), ("ad", ads, logged)):
            truth = whole.select("request_id", "item_id", "true_probability")
            _write(self._root / "truth" / f"domain={domain}", day, truth)
            columns = rows.drop("true_probability", "page_id").sort("request_id", "item_id")
            _write(self._root / "events" / f"domain={domain}", day, columns)
        self._keep_pages(ads, day)
        self._count(natural, ads, taken, day)
        return np.array([len(natural), len(logged), len(ads), int(ads["label"].sum())])

    def _domain(self, domain: Domain, day: date) -> pl.DataFrame:
        """Every candidate of the day's requests: one of a user, or none."""
        world, config, rng = self._world, self._config, self._world.rng
        comes = rng.random(config.users) < getattr(config, f"{domain}_requests")
        user = np.flatnonzero(comes & (world.user_from <= day.toordinal()))
        item, hour = world.candidates(domain, day, len(user)), rng.integers(0, 24, len(user))
        position = np.tile(np.arange(1, config.page_size + 1), (len(user), 1))
        chance = world.probability(domain, user, item, position, hour)
        request = self._number + np.arange(len(user))
        self._number += len(user)
        midnight = datetime(day.year, day.month, day.day)
        times = [
            midnight + timedelta(hours=int(h), seconds=int(u) % 3600)
            for h, u in zip(hour, user, strict=True)
        ]
        size = config.page_size
        return pl.DataFrame(
            {
                "request_id": np.repeat(request, size),
                "page_id": np.repeat(request, size),
                "user_id": np.array(_names("u", np.repeat(user, size)), object),
                "timestamp": pl.Series(times, dtype=pl.Datetime("us")).gather(
                    np.repeat(np.arange(len(user)), size)
                ),
                "item_id": np.array(_names("i", item.ravel()), object),
                "label": (rng.random(item.shape) < chance).ravel().astype(np.int8),
                "sample_weight": np.ones(item.size, np.float32),
                "hour": np.repeat(hour, size),
                "weekday": np.full(item.size, day.isoweekday()),
                "page_size": np.full(item.size, size),
                "position": position.ravel(),
                "true_probability": chance.ravel(),
            },
            schema_overrides={"user_id": pl.String, "item_id": pl.String},
        )

    def _sampled(self, ads: pl.DataFrame) -> pl.DataFrame:
        """All positives of a page and some of the rest."""
        order = pl.Series(self._world.rng.random(len(ads)))
        place = ads.with_columns(order=order).select(
            pl.col("order").rank("ordinal").over("request_id", "label")
        )["order"]
        rest = pl.len().over("request_id", "label")
        kept = ads.with_columns(
            sample_weight=(rest / pl.min_horizontal(rest, self._config.ad_negatives)).cast(
                pl.Float32
            )
        ).filter((pl.col("label") == 1) | (place <= self._config.ad_negatives))
        # A positive stands for itself; the weight of its page's negatives is the page's.
        weight = pl.col("sample_weight").filter(pl.col("label") == 0).max().over("request_id")
        return kept.with_columns(sample_weight=weight.fill_null(1.0))

    def _keep_pages(self, ads: pl.DataFrame, day: date) -> None:
        self._pages.append(ads.select("page_id", "item_id", "position"))
        columns = ["request_id", "user_id", "timestamp", "page_id", "hour", "weekday", "page_size"]
        first = ads.unique("request_id", maintain_order=True).select(columns)
        self._requests.append(first.with_columns(date=pl.lit(day)))

    def _count(
        self, natural: pl.DataFrame, ads: pl.DataFrame, taken: pl.DataFrame, day: date
    ) -> None:
        clicked = natural.filter(pl.col("label") == 1)
        for by, frames in self._days.items():
            for source, frame in (("ad", ads), ("natural", clicked), ("behaviour", taken)):
                counts = frame.group_by(by).agg(
                    impressions=pl.len().cast(pl.Int64),
                    positives=pl.col("label").sum().cast(pl.Int64),
                )
                columns = (pl.lit(source).alias("source"), pl.lit(day).alias("date"), by)
                frames.append(counts.select(*columns, "impressions", "positives"))


def _names(prefix: str, numbers: int | npt.NDArray[np.int64]) -> list[str]:
    places = range(numbers) if isinstance(numbers, int) else numbers.tolist()
    return [f"{prefix}{number:05d}" for number in places]


def _write(folder: Path, day: date, rows: pl.DataFrame) -> None:
    target = folder / f"date={day}"
    target.mkdir(parents=True)
    rows.write_parquet(target / "part-0.parquet")
