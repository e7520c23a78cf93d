"""Input checks: real and tiny logs pass, and each planted fault is named in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
import tiny
from conftest import Journey

from bundle.spec import Domain, SpecError
from training.checks import _ROW, InputError, check_inputs
from training.events import DataError

FIRST, LAST = date(2017, 3, 8), date(2017, 3, 21)
DAY, OTHER = date(2017, 3, 10), date(2017, 3, 20)
DOMAINS: tuple[Domain, ...] = ("ad", "natural")
Change = Callable[[pl.DataFrame], pl.DataFrame]


@pytest.fixture
def root(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of two weeks of the tiny log, to be spoiled."""
    kept = {f"date={FIRST + timedelta(days=i)}" for i in range(-1, 15)}

    def others(_: str, names: list[str]) -> list[str]:
        return [name for name in names if name.startswith("date=") and name not in kept]

    return Path(shutil.copytree(tiny_data, tmp_path / "data", ignore=others))


def part(root: Path, day: date, domain: str = "ad") -> Path:
    folder = root / "behaviour" if domain == "behaviour" else root / "events" / f"domain={domain}"
    return folder / f"date={day}" / "part-0.parquet"


def change(path: Path, how: Change) -> None:
    how(pl.read_parquet(path, hive_partitioning=False)).write_parquet(path)


def some(name: str, value: object, where: pl.Expr | None = None) -> Change:
    """Changes a column in its first three rows, or `where`."""
    chosen = pl.int_range(pl.len()) < 3 if where is None else where

    def how(frame: pl.DataFrame) -> pl.DataFrame:
        changed = pl.when(chosen).then(pl.lit(value)).otherwise(pl.col(name))
        return frame.with_columns(changed.cast(frame[name].dtype).alias(name))

    return how


def refused(root: Path, domain: Domain = "ad", allowed: int = 0) -> str:
    with pytest.raises(InputError) as caught:
        check_inputs(root, domain, FIRST, LAST, allowed)
    said = str(caught.value)
    assert "\n" not in said
    return said


def passes(root: Path, domain: Domain = "ad") -> bool:
    return check_inputs(root, domain, FIRST, LAST) == []


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_good_log_passes(tiny_data: Path, domain: Domain) -> None:
    assert check_inputs(tiny_data, domain, tiny.FIRST, tiny.LAST) == []


@pytest.mark.parametrize("domain", DOMAINS)
def test_two_months_of_the_real_log_pass_but_for_the_day_that_it_lacks(
    journey: Journey, domain: Domain
) -> None:
    first, christmas, last = date(2017, 11, 1), date(2017, 12, 25), date(2017, 12, 31)
    assert check_inputs(journey.root, domain, first, last, allow_missing_days=1) == [christmas]
    with pytest.raises(InputError, match="date=2017-12-25: no partition; 1 of the 61 days"):
        check_inputs(journey.root, domain, first, last)


@pytest.mark.parametrize("empty", [False, True])
def test_missing_days_are_refused_or_returned(root: Path, empty: bool) -> None:
    for day in (OTHER, DAY):
        part(root, day).unlink()
        if not empty:
            part(root, day).parent.rmdir()
    assert refused(root, allowed=1).endswith(
        "domain=ad/date=2017-03-10: no partition; 2 of the 14 days 2017-03-08 to 2017-03-21 are"
        " missing, at most 1 may be"
    )
    assert check_inputs(root, "ad", FIRST, LAST, allow_missing_days=2) == [DAY, OTHER]
    assert passes(root, "natural")


def test_a_log_without_any_day_is_refused_however_many_may_be_missing(root: Path) -> None:
    beyond = tiny.LAST + timedelta(days=1)
    with pytest.raises(InputError, match="at most 1 may be"):
        check_inputs(root, "ad", beyond, beyond + timedelta(days=1), allow_missing_days=9)
    with pytest.raises(InputError, match="first must not be after the last"):
        check_inputs(root, "ad", LAST, FIRST)


def test_no_log_and_a_spec_with_an_unknown_key_are_errors_as_ever(root: Path) -> None:
    with pytest.raises(DataError, match="holds no data set"):
        check_inputs(root / "nothing", "ad", FIRST, LAST)
    with (root / "features.toml").open("a") as file:
        file.write('\n[[feature]]\nname = "x"\nentity = "item"\nkind = "numeric"\nbuckts = 3\n')
    with pytest.raises(SpecError, match=r"'x': .*'buckts'"):
        check_inputs(root, "ad", FIRST, LAST)


CATEGORICAL = 'kind = "categorical"\nencoding = "hash"\nbuckets = 8\ndim = 2\n'
NUMERIC = 'kind = "numeric"\nencoding = "log"\n'
COUNT = 'count = {{ source = "{}", of = "positive", by = "{}", days = 3 }}\n'


@pytest.mark.parametrize(
    ("entity", "text", "said"),
    [
        ("user", CATEGORICAL, "features.toml: 'new': users.parquet must have this column"),
        ("user", NUMERIC, "features.toml: 'new': a number of a user must have a count"),
        ("item", CATEGORICAL, "no column 'new', must be String or an integer"),
        ("item", NUMERIC, "no column 'new', must be a number"),
        ("context", CATEGORICAL, "no column 'new', must be String or an integer"),
        ("context", NUMERIC + COUNT.format("ad", "hour"), "a count must be of a user or an item"),
        ("item", NUMERIC + COUNT.format("ad", "colour"), "counts by 'colour', must be one of item"),
        ("user", NUMERIC + COUNT.format("natural", "item_id"), "counts by 'item_id', must be one"),
    ],
)
def test_a_feature_that_nothing_provides_is_refused(
    root: Path, entity: str, text: str, said: str
) -> None:
    with (root / "features.toml").open("a") as file:
        file.write(f'\n[[feature]]\nname = "new"\nentity = "{entity}"\n{text}')
    assert said in refused(root)


def test_a_count_of_what_the_log_does_not_count_is_refused(root: Path) -> None:
    change(root / "item_days.parquet", lambda frame: frame.filter(pl.col("source") != "natural"))
    assert "'item_bought_3d': item_days.parquet must have the source 'natural'" in refused(root)


@pytest.mark.parametrize(
    "name",
    [*_ROW, "hour", "page_size", "slot", "page_same_kind"],
)
def test_a_column_that_is_needed_is_missed(root: Path, name: str) -> None:
    for folder in part(root, DAY).parent.parent.iterdir():
        change(folder / "part-0.parquet", lambda frame: frame.drop(name))
    assert f"date=2017-03-08/part-0.parquet: no column '{name}', must be" in refused(root)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("timestamp", pl.String, "timestamp is String, must be Datetime"),
        ("label", pl.Float32, "label is Float32, must be an integer"),
        ("sample_weight", pl.Int8, "sample_weight is Int8, must be a float"),
        ("request_id", pl.String, "request_id is String, must be an integer"),
        ("hour", pl.String, "hour is String, must be a number"),
        ("page_size", pl.String, "page_size is String, must be a number"),
        ("slot", pl.Categorical, "slot is Categorical, must be String or an integer"),
        ("user_id", pl.Categorical, "user_id is Categorical, must be String as in users.parquet"),
    ],
)
def test_a_column_of_a_wrong_type_is_refused(
    root: Path, name: str, kind: type[pl.DataType], said: str
) -> None:
    for folder in part(root, DAY).parent.parent.iterdir():
        change(folder / "part-0.parquet", lambda frame: frame.with_columns(pl.col(name).cast(kind)))
    assert said in refused(root)


def test_ids_of_another_type_than_their_table_s_are_refused(root: Path) -> None:
    items = pl.col("item_id").str.slice(1).cast(pl.Int64)
    change(root / "items.parquet", lambda frame: frame.with_columns(items))
    assert "item_id is String, must be Int64 as in items.parquet" in refused(root)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda f: f.with_columns(pl.col("hour").cast(pl.Int8)), "has hour Int8, must have hour"),
        (lambda f: f.drop("slot"), "has less, must have slot String as"),
        (lambda f: f.with_columns(new=1), "has new Int32, must have less as"),
        (lambda f: f.select(reversed(f.columns)), "has user_id String, timestamp Datetime"),
    ],
)
def test_a_partition_with_other_columns_than_the_others_is_refused(
    root: Path, how: Change, said: str
) -> None:
    change(part(root, DAY), how)
    assert f"date=2017-03-10/part-0.parquet: {said}" in refused(root)
    assert passes(root, "natural")


def test_a_file_that_is_no_table_is_refused(root: Path) -> None:
    part(root, DAY).write_bytes(b"PAR1 but no more")
    assert "date=2017-03-10/part-0.parquet: must be readable as Parquet: " in refused(root)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("user_id", "nobody", "user_id is nobody in 3 of # rows, must be in users.parquet"),
        ("user_id", None, "user_id is None in 3 of # rows, must be in users.parquet"),
        ("item_id", "i99", "item_id is i99 in 3 of # rows, must be in items.parquet"),
        (
            "timestamp",
            datetime(2017, 3, 11, 5),
            "timestamp is 2017-03-11 05:00:00 in 3 of # rows, must be on 2017-03-10",
        ),
        ("timestamp", None, "timestamp is None in 3 of # rows, must be on 2017-03-10"),
        ("label", 2, "label is 2 in 3 of # rows, must be 0 or 1"),
        ("label", None, "label is None in 3 of # rows, must be 0 or 1"),
        ("sample_weight", 0.5, "sample_weight is 0.5 in 3 of # rows, must be finite and at least"),
        ("sample_weight", float("inf"), "sample_weight is inf in 3 of # rows, must be finite"),
        ("sample_weight", float("nan"), "sample_weight is nan in 3 of # rows, must be finite"),
        ("sample_weight", None, "sample_weight is None in 3 of # rows, must be finite"),
        ("request_id", None, "request_id is None in 3 of # rows, must be a number"),
    ],
)
@pytest.mark.parametrize("domain", DOMAINS)
def test_a_wrong_value_is_refused(
    root: Path, domain: Domain, name: str, value: object, said: str
) -> None:
    change(part(root, DAY, domain), some(name, value))
    rows = len(pl.read_parquet(part(root, DAY, domain), hive_partitioning=False))
    assert f"date=2017-03-10: {said}".replace("#", str(rows)) in refused(root, domain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["page_size", "page_same_kind", "hour"])
def test_a_feature_that_is_not_finite_is_refused(root: Path, name: str, value: float) -> None:
    for folder in part(root, DAY).parent.parent.iterdir():
        own = pl.col(name).cast(pl.Float64)
        change(folder / "part-0.parquet", lambda frame, own=own: frame.with_columns(own))
    assert passes(root)
    change(part(root, DAY), some(name, value))
    assert f"date=2017-03-10: {name} is {value} in 3 of" in refused(root)


def test_a_number_that_some_rows_lack_is_refused_a_name_is_not(root: Path) -> None:
    change(part(root, DAY), some("slot", None))
    change(part(root, DAY), some("hour", None))
    assert passes(root)
    change(part(root, DAY), some("page_size", None))
    rows = len(pl.read_parquet(part(root, DAY), hive_partitioning=False))
    assert refused(root).endswith(
        f"date=2017-03-10: page_size is null in 3 of {rows} rows, must be in all of the domain's or"
        " in none"
    )


@pytest.mark.parametrize(("domain", "value"), [("ad", None), ("natural", 7)])
def test_a_number_that_a_day_has_unlike_all_others_is_refused(
    root: Path, domain: Domain, value: int | None
) -> None:
    change(part(root, DAY, domain), some("page_same_kind", value, pl.lit(True)))
    assert "date=2017-03-10: page_same_kind is null in" in refused(root, domain)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_partition_under_two_dates_is_refused(root: Path, domain: Domain) -> None:
    shutil.copy(part(root, DAY, domain), part(root, OTHER, domain))
    assert "must be on 2017-03-20" in refused(root, domain)
    later = pl.col("timestamp") + (OTHER - DAY)
    change(part(root, OTHER, domain), lambda frame: frame.with_columns(later))
    assert "is in date=2017-03-10 too, must be in one of them" in refused(root, domain)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_part_that_is_there_twice_is_refused(root: Path, domain: Domain) -> None:
    path = part(root, DAY, domain)
    shutil.copy(path, path.with_name("part-1.parquet"))
    assert "times in request" in refused(root, domain)


def test_a_negative_may_be_drawn_twice_in_the_natural_domain_alone(root: Path) -> None:
    for domain in DOMAINS:
        twice = pl.col("label") == 0
        change(part(root, DAY, domain), lambda f, t=twice: pl.concat([f, f.filter(t).head(1)]))
    assert passes(root, "natural")
    assert "stands 2 times in request" in refused(root, "ad")


def test_what_was_taken_is_no_negative_of_the_same_request(root: Path) -> None:
    def contradict(frame: pl.DataFrame) -> pl.DataFrame:
        taken = frame.filter(pl.col("label") == 1).head(1)
        return pl.concat([frame, taken.with_columns(label=pl.lit(0, pl.Int8))])

    change(part(root, DAY, "natural"), contradict)
    assert "stands 2 times in request" in refused(root, "natural")


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_log_without_a_positive_is_refused(root: Path, domain: Domain) -> None:
    for folder in part(root, DAY, domain).parent.parent.iterdir():
        change(folder / "part-0.parquet", some("label", 0, pl.lit(True)))
    assert "label is 0 in all" in refused(root, domain, allowed=30)


def test_a_day_whose_labels_have_not_arrived_is_missing(root: Path) -> None:
    change(part(root, DAY), some("label", 0, pl.lit(True)))
    # A few rows without a positive are no wonder.
    assert passes(root)
    rows = pl.read_parquet(part(root, DAY), hive_partitioning=False)
    many = [rows.with_columns(pl.col("request_id") + 1_000_000 * i) for i in range(20)]
    pl.concat(many).write_parquet(part(root, DAY))
    assert "date=2017-03-10: label is 0 in all" in refused(root)
    assert check_inputs(root, "ad", FIRST, LAST, allow_missing_days=1) == [DAY]


def test_a_day_with_positives_that_nobody_took_is_missing(root: Path) -> None:
    shutil.rmtree(part(root, DAY, "behaviour").parent)
    assert "behaviour/date=2017-03-10: no partition, but there are positives" in refused(root)
    assert check_inputs(root, "ad", FIRST, LAST, allow_missing_days=1) == [DAY]
    change(part(root, DAY), some("label", 0, pl.lit(True)))
    assert passes(root)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (some("user_id", "nobody"), "user_id is nobody in 3 of"),
        (some("item_id", "i99"), "item_id is i99 in 3 of"),
        (some("timestamp", datetime(2017, 3, 11)), "timestamp is 2017-03-11 00:00:00 in 3 of"),
        (lambda f: f.drop("timestamp"), "has less, must have timestamp"),
    ],
)
def test_faults_of_what_was_taken_are_refused(root: Path, how: Change, said: str) -> None:
    change(part(root, DAY, "behaviour"), how)
    found = refused(root)
    assert "behaviour/date=2017-03-10/part-0.parquet: " in found
    assert said in found


def test_what_was_taken_on_another_day_is_refused(root: Path) -> None:
    later = pl.col("timestamp") + (OTHER - DAY)
    path = part(root, OTHER, "behaviour")
    shutil.copy(part(root, DAY, "behaviour"), path)
    change(path, lambda frame: frame.with_columns(later).reverse())
    said = refused(root)
    assert "behaviour/date=2017-03-20/part-0.parquet: has the rows of " in said
    assert "behaviour/date=2017-03-10/part-0.parquet, must have its own" in said


def test_days_outside_of_the_span_are_not_looked_at(root: Path) -> None:
    for day in (FIRST - timedelta(days=1), LAST + timedelta(days=1)):
        part(root, day).write_bytes(b"")
    assert passes(root)
