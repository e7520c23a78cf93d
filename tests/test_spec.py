"""The feature spec: what it gives, and what it refuses, by name."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from bundles import FEATURES

from bundle.spec import Count, Spec, SpecError, parse_spec, read_spec

ROOT = Path(__file__).parent.parent


def spec_with(feature: str, /, **changes: Any) -> Spec:
    """The tiny spec with one feature changed; None removes a key."""
    document = tomllib.loads(FEATURES)
    entry = next(e for e in document["feature"] if e["name"] == feature)
    entry.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del entry[key]
    return parse_spec(document)


def names(spec: Spec, *group: Any) -> list[str]:
    return [feature.name for feature in spec.of(*group)]


def test_features_are_grouped_by_entity_and_kind_in_the_order_of_the_file() -> None:
    spec = parse_spec(tomllib.loads(FEATURES))
    assert names(spec, "user", "categorical") == ["user_id", "age"]
    assert names(spec, "user", "numeric") == ["income"]
    assert names(spec, "context", "categorical") == ["hour"]
    assert names(spec, "item", "numeric") == ["price"]
    assert spec.of("item", "history") == ()
    assert spec.history.name == "history"
    assert spec.names("item") == {"category", "price"}


def test_groups_are_computed_once_and_change_neither_equality_nor_hash() -> None:
    spec, other = (parse_spec(tomllib.loads(FEATURES)) for _ in range(2))
    assert spec.of("user", "categorical") is spec.of("user", "categorical")
    assert spec == other
    assert hash(spec) == hash(other)


def test_a_feature_is_found_by_name_and_an_unknown_one_lists_what_there_is() -> None:
    spec = parse_spec(tomllib.loads(FEATURES))
    assert spec["hour"].boundaries == (6, 12, 18)
    assert spec["hour"].table == "hour"
    assert spec["history"].match == ("category",)
    with pytest.raises(SpecError, match=r"'colour'.*user_id, age, income"):
        spec["colour"]


def test_a_count_is_read_with_its_defaults() -> None:
    count = {"source": "ad", "of": "impression", "by": "user_id", "days": 7}
    assert spec_with("income", count=count)["income"].count == Count(**count)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("age", {"entity": "shop"}, "entity is 'shop'"),
        ("age", {"kind": "text"}, "kind is 'text'"),
        ("age", {"encoding": "log"}, "encoding is 'log'"),
        ("age", {"encoding": None}, "encoding is None"),
        ("income", {"encoding": "hash"}, "encoding is 'hash'"),
        ("age", {"dim": 0}, "dim is 0"),
        ("age", {"dim": "4"}, "'str'"),
        ("age", {"colour": 1}, "colour"),
        ("age", {"entity": None}, "entity"),
        ("user_id", {"buckets": 1}, "buckets is 1"),
        ("hour", {"boundaries": [6, 6]}, "must rise"),
        ("hour", {"boundaries": [12, 6]}, "must rise"),
        ("hour", {"boundaries": [6, "12"]}, "'str'"),
        ("history", {"attend": 6}, "attend <= max_length"),
        ("history", {"attend": 0}, "attend <= max_length"),
        ("history", {"entity": "item"}, "the user's"),
        ("history", {"match": ["price"]}, "'price'"),
        ("income", {"count": {"source": "ad"}}, "missing 3"),
        ("income", {"count": 7}, "Count"),
    ],
)
def test_a_feature_that_contradicts_itself_is_refused_and_named(
    name: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(SpecError) as caught:
        spec_with(name, **changes)
    assert name in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"days": 0}, "at least 1 day"),
        ({"source": "adds"}, "'adds'"),
        ({"of": "click"}, "'click'"),
        ({"per": "click", "prior": 1.0, "strength": 1.0}, "'click'"),
        ({"per": "impression"}, "above 0"),
        ({"per": "impression", "prior": -0.1, "strength": -5.0}, "above 0"),
    ],
)
def test_a_count_that_counts_nothing_is_refused(changes: dict[str, Any], says: str) -> None:
    count = {"source": "ad", "of": "positive", "by": "user_id", "days": 7, **changes}
    with pytest.raises(SpecError, match=says):
        spec_with("income", count=count)


def test_only_a_numeric_feature_can_be_a_count() -> None:
    count = {"source": "ad", "of": "positive", "by": "user_id", "days": 7}
    with pytest.raises(SpecError, match=r"'age'.*must be numeric"):
        spec_with("age", count=count)


def test_features_may_share_a_table_only_when_it_has_the_same_shape_for_both() -> None:
    shared = spec_with("age", table="category")
    assert shared["age"].table == shared["category"].table
    for changes in ({"dim": 8}, {"encoding": "hash", "buckets": 9}):
        with pytest.raises(SpecError, match=r"'age' and 'category' share the table"):
            spec_with("age", table="category", **changes)


def test_features_that_share_a_table_must_have_the_same_boundaries() -> None:
    document = tomllib.loads(FEATURES)
    hour = next(e for e in document["feature"] if e["name"] == "hour")
    document["feature"].append({**hour, "name": "opened", "table": "hour"})
    assert parse_spec(document)["opened"].table == "hour"
    document["feature"][-1]["boundaries"] = [6, 12, 18, 21]
    with pytest.raises(SpecError, match=r"'hour' and 'opened' share .* boundaries"):
        parse_spec(document)


def test_a_name_may_stand_only_once_and_must_be_there() -> None:
    for name, says in (("income", "repeat"), ("", "no name"), (None, "no name"), (7, "no name")):
        with pytest.raises(SpecError, match=says):
            spec_with("age", name=name)


def test_there_is_exactly_one_history() -> None:
    document = tomllib.loads(FEATURES)
    history = document["feature"].pop()
    with pytest.raises(SpecError, match="has 0"):
        parse_spec(document)
    document["feature"] += [history, {**history, "name": "more"}]
    with pytest.raises(SpecError, match="has 2"):
        parse_spec(document)


@pytest.mark.parametrize("text", ["", "feature = []", "feature = 3", "feature = ['age']"])
def test_a_file_without_features_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "features.toml"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"features.toml: needs at least one \[\[feature\]\]"):
        read_spec(path)


def test_a_file_that_is_not_toml_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "features.toml"
    path.write_text("[[feature]\nname = ")
    with pytest.raises(SpecError, match=r"features.toml: not TOML"):
        read_spec(path)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("training/datasets/*.toml")), ids=lambda p: p.stem
)
def test_the_spec_of_every_data_set_can_be_read(path: Path) -> None:
    assert read_spec(path).history.attend > 0
