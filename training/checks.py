"""Whether the log is fit to be learned from, before a tier spends an hour on it.

What is wrong is said in one line: the file, the column, the value, and what would be right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import polars as pl

from bundle.spec import Count, Domain, Entity, Feature
from training.events import EventLog, days_between

_ROW = ("user_id", "item_id", "timestamp", "label", "sample_weight", "request_id")
_EXPECTED = 20.0
"""Positives that a day would have at the rate of all days. A day that has none then has not been
labelled: chance alone does that once in e**20 days."""
_Files = Mapping[date, Sequence[Path]]
_Rule = tuple[str, pl.Expr, str]
"""A column, what holds of each of its values, and the same in words."""


class InputError(ValueError):
    """The log is not fit to be learned from; the message says where, what, and what is right."""


@dataclass(frozen=True)
class _Column:
    name: str
    right: str
    """Its type in words."""
    fits: Callable[[pl.DataType], bool]


@dataclass(frozen=True)
class _Day:
    """A day of a domain, checked by itself."""

    day: date
    rows: int
    positives: int
    requests: pl.Series
    """Each once."""


def check_inputs(
    log_root: Path, domain: Domain, first: date, last: date, allow_missing_days: int = 0
) -> list[date]:
    """Checks the days first .. last of a domain, what was taken on them, and that the log has every
    feature of its spec; returns the days that are missing and must not be learned from.

    A day is missing where the domain has no partition of it; where it has positives, but
    `behaviour/` has none; and where it has rows enough for 20 positives at the rate of all days,
    but none: then its labels have not arrived.

    Every partition has all context features, and the item features that neither `items.parquet`
    nor a count provides; a domain that does not know one has nulls there. A number is null in all
    of a domain's rows or in none; other nulls are *missing*, and right. A request belongs to one
    day. An item stands once in a request; in the natural domain, whose negatives may be drawn
    twice, one that was taken does.

    Raises:
        InputError: more than `allow_missing_days` days are missing, or all; or anything is wrong.
        DataError: there is no log.
        SpecError: its spec contradicts itself.
    """
    log, days = EventLog(log_root), days_between(first, last)
    if not days:
        raise InputError(f"no days from {first} to {last}: the first must not be after the last")
    _check_spec(log)
    folder = log_root / "events" / f"domain={domain}"
    events = {day: files for day in days if (files := _files(folder, day))}
    missing = {day: f"{folder}/date={day}: no partition" for day in days if day not in events}
    _refuse_missing(missing, days, allow_missing_days)
    _check_schemas([path for files in events.values() for path in files], _row_columns(log))
    checked = list(_check_days(log, domain, events))
    _check_requests(folder, checked)
    behaviour = {day: _files(log_root / "behaviour", day) for day in events}
    missing |= _unlabelled(folder, checked)
    missing |= {
        d.day: f"{log_root}/behaviour/date={d.day}: no partition, but there are positives"
        for d in checked
        if d.positives and not behaviour[d.day]
    }
    _refuse_missing(missing, days, allow_missing_days)
    _check_behaviour(log, behaviour)
    return sorted(missing)


def _files(folder: Path, day: date) -> list[Path]:
    return sorted((folder / f"date={day}").glob("*.parquet"))


def _refuse_missing(missing: Mapping[date, str], days: Sequence[date], allowed: int) -> None:
    allowed = min(allowed, len(days) - 1)
    if len(missing) > allowed:
        raise InputError(
            f"{missing[min(missing)]}; {len(missing)} of the {len(days)} days {days[0]} to"
            f" {days[-1]} are missing, at most {allowed} may be"
        )


# The spec: every feature comes from somewhere.


def _check_spec(log: EventLog) -> None:
    where = log.root / "features.toml"
    users = _schema(log.root / "users.parquet")
    sources = {"user": _sources(log, "user"), "item": _sources(log, "item"), "context": set()}
    for feature in log.spec.features:
        if feature.count:
            _check_count(log, feature, feature.count, sources[feature.entity])
        elif (feature.entity, feature.kind) == ("user", "numeric"):
            raise InputError(f"{where}: {feature.name!r}: a number of a user must have a count")
        elif (feature.entity, feature.kind, feature.name in users) == (
            "user",
            "categorical",
            False,
        ):
            raise InputError(f"{where}: {feature.name!r}: users.parquet must have this column")


def _sources(log: EventLog, entity: Entity) -> set[str]:
    days = pl.scan_parquet(log.root / f"{entity}_days.parquet")
    return set(days.select(pl.col("source").unique()).collect()["source"])


def _check_count(log: EventLog, feature: Feature, count: Count, sources: set[str]) -> None:
    where, entity = f"{log.root / 'features.toml'}: {feature.name!r}", feature.entity
    if entity == "context":
        raise InputError(f"{where}: a count must be of a user or an item")
    groups = [f"{entity}_id", *(f.name for f in log.spec.of(entity, "categorical"))]
    if count.by not in groups:
        right = ", ".join(dict.fromkeys(groups))
        raise InputError(f"{where}: counts by {count.by!r}, must be one of {right}")
    if count.source not in sources:
        raise InputError(f"{where}: {entity}_days.parquet must have the source {count.source!r}")


def _carried(log: EventLog) -> list[Feature]:
    """The features that rows must have a column of. A number in `items.parquet` is never read."""
    items = _schema(log.root / "items.parquet")
    return [
        f
        for f in log.spec.features
        if f.entity == "context"
        or (f.entity == "item" and not f.count and (f.kind == "numeric" or f.name not in items))
    ]


# The columns: what is needed, and the same in every file.


def _check_schemas(paths: Sequence[Path], needed: Sequence[_Column]) -> None:
    schema = _schema(paths[0])
    for column in needed:
        if column.name not in schema:
            raise InputError(f"{paths[0]}: no column {column.name!r}, must be {column.right}")
        if not column.fits(schema[column.name]):
            found = schema[column.name]
            raise InputError(f"{paths[0]}: {column.name} is {found}, must be {column.right}")
    _check_alike(paths)


def _row_columns(log: EventLog) -> list[_Column]:
    columns = [*_key_columns(log), _Column("timestamp", "Datetime", _is_time)]
    columns += [_Column(name, "an integer", _is_integer) for name in ("label", "request_id")]
    columns.append(_Column("sample_weight", "a float", lambda kind: kind.is_float()))
    for feature in _carried(log):
        if _is_number(feature):
            columns.append(_Column(feature.name, "a number", lambda kind: kind.is_numeric()))
        else:
            columns.append(_Column(feature.name, "String or an integer", _is_name))
    return columns


def _key_columns(log: EventLog) -> list[_Column]:
    columns = []
    for entity in ("user", "item"):
        own = _schema(log.root / f"{entity}s.parquet")[f"{entity}_id"]
        columns.append(_Column(f"{entity}_id", f"{own} as in {entity}s.parquet", own.__eq__))
    return columns


def _is_number(feature: Feature) -> bool:
    return feature.kind == "numeric" or feature.encoding == "bucketise"


def _is_time(kind: pl.DataType) -> bool:
    return isinstance(kind, pl.Datetime)


def _is_integer(kind: pl.DataType) -> bool:
    return kind.is_integer()


def _is_name(kind: pl.DataType) -> bool:
    return kind == pl.String or kind.is_integer()


def _check_alike(paths: Sequence[Path]) -> None:
    """Files are read as one table: columns, their types and their order are the same in all."""
    first = [f"{name} {kind}" for name, kind in _schema(paths[0]).items()]
    for path in paths[1:]:
        own = [f"{name} {kind}" for name, kind in _schema(path).items()]
        if own == first:
            continue
        found = [column for column in own if column not in first]
        right = [column for column in first if column not in own]
        if not found and not right:
            found, right = own, first
        raise InputError(
            f"{path}: has {', '.join(found) or 'less'}, must have {', '.join(right) or 'less'}"
            f" as {paths[0]}"
        )


def _schema(path: Path) -> Mapping[str, pl.DataType]:
    try:
        return pl.read_parquet_schema(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        what = str(error).partition("\n")[0]
        raise InputError(f"{path}: must be readable as Parquet: {what}") from error


# The rows of a day.


def _check_days(log: EventLog, domain: Domain, events: _Files) -> Iterator[_Day]:
    carried = _carried(log)
    finite = [f.name for f in carried if _is_number(f)]
    numeric = [f.name for f in carried if f.kind == "numeric"]
    users, items, has = _ids(log, "user"), _ids(log, "item"), dict[str, bool]()
    for day, paths in events.items():
        rows, where = _read(paths, [*_ROW, *finite]), paths[0].parent
        _refuse(rows, where, [*_key_rules(day, users, items), *_value_rules(finite)])
        _check_nulls(rows, where, numeric, has)
        _check_repeats(rows, where, domain)
        yield _Day(day, len(rows), int(rows["label"].sum()), rows["request_id"].unique())


def _read(paths: Sequence[Path], columns: Sequence[str] | None = None) -> pl.DataFrame:
    return pl.read_parquet(
        list(paths), columns=list(columns) if columns else None, hive_partitioning=False
    )


def _ids(log: EventLog, entity: Entity) -> pl.Series:
    """As one list, for `is_in`."""
    name = f"{entity}_id"
    return pl.read_parquet(log.root / f"{entity}s.parquet", columns=[name])[name].implode()


def _key_rules(day: date, users: pl.Series, items: pl.Series) -> list[_Rule]:
    return [
        ("user_id", pl.col("user_id").is_in(users), "in users.parquet"),
        ("item_id", pl.col("item_id").is_in(items), "in items.parquet"),
        ("timestamp", pl.col("timestamp").dt.date() == day, f"on {day}"),
    ]


def _value_rules(finite: Sequence[str]) -> list[_Rule]:
    weight = pl.col("sample_weight")
    return [
        ("label", pl.col("label").is_in([0, 1]), "0 or 1"),
        ("sample_weight", weight.is_finite() & (weight >= 1), "finite and at least 1"),
        ("request_id", pl.col("request_id").is_not_null(), "a number"),
        *((n, pl.col(n).is_finite() | pl.col(n).is_null(), "finite") for n in finite),
    ]


def _refuse(rows: pl.DataFrame, where: Path, rules: Sequence[_Rule]) -> None:
    for name, holds, right in rules:
        wrong = rows.filter(~holds.fill_null(False))
        if len(wrong):
            raise InputError(
                f"{where}: {name} is {wrong[name][0]} in {len(wrong):,} of {len(rows):,} rows,"
                f" must be {right}"
            )


def _check_nulls(
    rows: pl.DataFrame, where: Path, numeric: Sequence[str], has: dict[str, bool]
) -> None:
    """has: whether the domain has a feature, as its first day says; filled here."""
    for name in numeric:
        nulls = rows[name].null_count()
        if nulls != (0 if has.setdefault(name, nulls < len(rows)) else len(rows)):
            raise InputError(
                f"{where}: {name} is null in {nulls:,} of {len(rows):,} rows, must be in all of the"
                " domain's or in none"
            )


def _check_repeats(rows: pl.DataFrame, where: Path, domain: Domain) -> None:
    pairs = rows.group_by("request_id", "item_id").agg(pl.len(), pl.col("label").max())
    wrong = pairs.filter((pl.col("len") > 1) & ((pl.col("label") == 1) | (domain == "ad")))
    if len(wrong):
        request, item, times, _ = wrong.sort("request_id", "item_id").row(0)
        raise InputError(
            f"{where}: item {item} stands {times} times in request {request}, must do so once"
            f" ({len(wrong):,} such items)"
        )


# Days together.


def _check_requests(folder: Path, days: Sequence[_Day]) -> None:
    requests = pl.concat([d.requests for d in days])
    if requests.n_unique() == len(requests):
        return
    on = pl.concat([pl.Series([d.day]).new_from_index(0, len(d.requests)) for d in days])
    twice = pl.DataFrame({"request": requests, "day": on}).filter(requests.is_duplicated())
    request, one = twice.sort("request", "day").row(0)
    other = twice.sort("request", "day")["day"][1]
    raise InputError(
        f"{folder}/date={other}: request {request} is in date={one} too, must be in one of them"
        f" ({twice['request'].n_unique():,} such requests)"
    )


def _unlabelled(folder: Path, days: Sequence[_Day]) -> dict[date, str]:
    """The days whose labels have not arrived."""
    rows, positives = sum(d.rows for d in days), sum(d.positives for d in days)
    if not positives:
        raise InputError(
            f"{folder}: label is 0 in all {rows:,} rows of {days[0].day} to {days[-1].day}, must be"
            " 1 where something was taken"
        )
    return {
        d.day: f"{folder}/date={d.day}: label is 0 in all {d.rows:,} rows, must be 1 in some"
        for d in days
        if not d.positives and d.rows * positives / rows >= _EXPECTED
    }


def _check_behaviour(log: EventLog, behaviour: _Files) -> None:
    files = [(day, path) for day, paths in behaviour.items() for path in paths]
    if not files:
        return
    _check_schemas([path for _, path in files], _key_columns(log))
    users, items, seen = _ids(log, "user"), _ids(log, "item"), dict[str, Path]()
    for day, path in files:
        rows = _read([path])
        rules = _key_rules(day, users, items)
        _refuse(rows, path, [rule for rule in rules if rule[0] in rows.columns])
        if (other := seen.setdefault(_digest(rows), path)) != path:
            raise InputError(f"{path}: has the rows of {other}, must have its own")


def _digest(rows: pl.DataFrame) -> str:
    """Equal where all rows are, but for the dates of their times."""
    times = rows.with_columns(pl.col(pl.Datetime).dt.time())
    return hashlib.sha256(times.hash_rows().sort().to_numpy().tobytes()).hexdigest()
