"""The encoder: columns and requests to arrays, and every value that it must refuse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bundles import CATEGORIES, ITEMS, add_bundle, make_place
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.artifact import open_artifact
from bundle.encode import AGE, COUNT, Arrays, Encoded, Encoder, FeatureError, Request
from bundle.ids import hash_ids
from bundle.match import match_width

REQUEST = Request(
    user_id="user-3",
    item_ids=ITEMS[:3],
    user_features={"age": "18-24", "income": 1200},
    context={"hour": 13, "slot": 2},
    item_features={},
    history_items=["item-9", "item-1"],
    history_age_days=[4.5, 1],
    history_count=[1, 2],
)
CATEGORICAL = ("user_id", "age", "hour", "category")
NUMERIC = ("income", "slot", "price")

unhurried = settings(deadline=None)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers()
raw_texts = st.text(max_size=12) | st.integers() | st.sampled_from(["18-24", *CATEGORIES])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    place = make_place(tmp_path_factory.mktemp("place"))
    return open_artifact(place.registry.path(add_bundle(place))).encoder


def refusal(encoder: Encoder, **changes: Any) -> FeatureError:
    with pytest.raises(FeatureError) as caught:
        encoder.request(replace(REQUEST, **changes))
    assert caught.value.field in str(caught.value)
    return caught.value


def items_of(encoder: Encoder, encoded: Encoded) -> Arrays:
    """All that is known of the candidates themselves."""
    return encoder.item_inputs(encoded, np.arange(len(encoded.item_keys)))


def same(left: Encoded, right: Encoded) -> bool:
    return (
        left.inputs.keys() == right.inputs.keys()
        and all(np.array_equal(left.inputs[name], right.inputs[name]) for name in left.inputs)
        and left.missing == right.missing
        and left.user_key.tolist() == right.user_key.tolist()
        and left.item_keys.tolist() == right.item_keys.tolist()
    )


def values_for(name: str) -> st.SearchStrategy[list[Any]]:
    if name in ("hour", "slot"):
        values: st.SearchStrategy[Any] = st.none() | numbers
    elif name in NUMERIC:
        values = st.none() | st.floats(0, 1e299) | st.integers(0, 10**20)
    else:
        values = st.none() | raw_texts
    return st.lists(values.filter(lambda v: not isinstance(v, float) or abs(v) < 1e300))


@unhurried
@given(st.data(), st.sampled_from(CATEGORICAL))
def test_a_categorical_column_is_encoded_as_its_values_are_one_by_one(
    encoder: Encoder, data: st.DataObject, name: str
) -> None:
    feature, values = encoder.spec[name], data.draw(values_for(name))
    column = encoder.categorical(feature, values, name)
    alone = [int(encoder.categorical(feature, [value], name)[0]) for value in values]
    assert column.tolist() == alone
    assert column.dtype == np.int32
    assert ((column >= 0) & (column < encoder.table_size(feature))).all()
    assert all(column[i] == 0 for i, value in enumerate(values) if value is None)


@unhurried
@given(st.data(), st.sampled_from(NUMERIC))
def test_a_numeric_column_is_encoded_as_its_values_are_one_by_one(
    encoder: Encoder, data: st.DataObject, name: str
) -> None:
    feature, values = encoder.spec[name], data.draw(values_for(name))
    column = encoder.numeric(feature, values, name)
    alone = [encoder.numeric(feature, [value], name)[0].tolist() for value in values]
    assert column.tolist() == alone
    assert column.shape == (len(values), 2)
    assert column.dtype == np.float32
    assert np.isfinite(column).all()
    assert column[:, 1].tolist() == [float(value is not None) for value in values]
    assert not column[column[:, 1] == 0].any()


@unhurried
@given(raw_texts, numbers.filter(lambda v: abs(v) < 1e300), st.floats(0, 1e9))
def test_a_value_is_encoded_in_a_request_as_it_is_in_a_column(
    encoder: Encoder, text: str | int, number: float, amount: float
) -> None:
    spec = encoder.spec
    request = replace(
        REQUEST,
        user_id=text,
        user_features={"age": text, "income": amount},
        context={"hour": number, "slot": number},
        item_features={"category": [text] * 3, "price": [amount] * 3},
    )
    inputs = encoder.request(request).inputs

    def index(name: str, value: Any) -> int:
        return int(encoder.categorical(spec[name], [value, None], name)[0])

    def pair(name: str, value: Any) -> list[float]:
        return encoder.numeric(spec[name], [value, None], name)[0].tolist()

    assert inputs["user_cat"].tolist() == [[index("user_id", text), index("age", text)]]
    assert inputs["user_num"].tolist() == [pair("income", amount)]
    assert inputs["context_cat"].tolist() == [[index("hour", number)]]
    assert inputs["context_num"].tolist() == [pair("slot", number)]
    items = items_of(encoder, encoder.request(request))
    assert items["item_num"].tolist() == [pair("price", amount)] * 3
    if text in CATEGORIES:
        assert items["item_cat"].tolist() == [[index("category", text)]] * 3


@pytest.mark.parametrize("num", [1, 50])
def test_encoded_values_are_these_in_every_version(encoder: Encoder, num: int) -> None:
    spec = encoder.spec

    def column(name: str, values: list[Any]) -> Any:
        encode = encoder.categorical if name in CATEGORICAL else encoder.numeric
        return encode(spec[name], values * num, name)[: len(values)].tolist()

    assert column("user_id", ["user-1", 17, "17", None]) == [39, 66, 66, 0]
    assert column("age", ["18-24", "25-34", "99", None]) == [1, 2, 0, 0]
    assert column("hour", [-1e9, 5.9, 6, 11, 12, 18, 1e9, None]) == [1, 1, 2, 2, 3, 4, 4, 0]
    assert column("slot", [0, -2.5, 1e9, -1e9, None]) == [
        [0, 1],
        [-2.5, 1],
        [1e6, 1],
        [-1e6, 1],
        [0, 0],
    ]
    expected = [float(np.float32(math.log(1 + value))) for value in (0, 1, 1e299)]
    assert column("price", [0, 1, 1e299]) == [[value, 1] for value in expected]


def test_the_table_of_each_encoding_has_a_row_for_every_index(encoder: Encoder) -> None:
    sizes = {name: encoder.table_size(encoder.spec[name]) for name in CATEGORICAL}
    assert sizes == {"user_id": 100, "age": 3, "hour": 5, "category": 4}
    hashed = encoder.categorical(encoder.spec["user_id"], list(range(5000)), "user_id")
    assert set(hashed.tolist()) == set(range(1, 100))


def test_a_request_has_the_shapes_and_types_that_the_graph_reads(encoder: Encoder) -> None:
    for num in (0, 1, 7, 1000):
        ids = [f"item-{i}" for i in range(num)]
        encoded = encoder.request(replace(REQUEST, item_ids=ids))
        shapes = {name: (a.dtype.name, a.shape) for name, a in encoded.inputs.items()}
        assert shapes == {
            "user_cat": ("int32", (1, 2)),
            "user_num": ("float32", (1, 2)),
            "context_cat": ("int32", (1, 1)),
            "context_num": ("float32", (1, 2)),
            "history_item": ("int64", (1, 3)),
            "history_cat": ("int32", (1, 3, 1)),
            "history_num": ("float32", (1, 3, 2)),
            "match": ("float32", (num, match_width(1))),
            "given_cat": ("int32", (num, 0)),
            "given_num": ("float32", (num, 0)),
        }
        items = {name: (a.dtype.name, a.shape) for name, a in items_of(encoder, encoded).items()}
        assert items == {"item_cat": ("int32", (num, 1)), "item_num": ("float32", (num, 2))}
        assert encoded.item_keys.tolist() == hash_ids(ids).tolist()
        assert encoded.item_rows.tolist() == encoder.items.rows(encoded.item_keys).tolist()
        assert encoded.user_key.tolist() == hash_ids(["user-3"]).tolist()
        assert encoded.missing == ({"category": 950, "price": 950} if num == 1000 else {})


def test_candidates_keep_their_order_and_duplicates(encoder: Encoder) -> None:
    ids = ["item-4", "item-2", "item-4", "nothing", "item-0"]
    inputs = items_of(encoder, encoder.request(replace(REQUEST, item_ids=ids)))
    assert inputs["item_cat"][:, 0].tolist() == [2, 3, 2, 0, 1]
    assert inputs["item_num"][:, 0].tolist() == pytest.approx(
        [math.log(5), math.log(3), math.log(5), 0, 0]
    )
    assert inputs["item_num"][:, 1].tolist() == [1, 1, 1, 0, 1]


def test_integer_ids_are_the_same_as_their_text(encoder: Encoder) -> None:
    def ask(convert: Any) -> Encoded:
        ids = [convert(i) for i in range(30)]
        changes = {"user_id": ids[7], "item_ids": ids, "history_items": ids[:2]}
        return encoder.request(replace(REQUEST, **changes))

    assert same(ask(int), ask(str))


def test_unknown_and_absent_values_are_missing_and_counted(encoder: Encoder) -> None:
    empty = replace(
        REQUEST,
        item_ids=["item-1", "new", "newer"],
        user_features={"age": "99"},
        context={"hour": None},
        history_items=(),
        history_age_days=(),
        history_count=(),
    )
    encoded = encoder.request(empty)
    assert encoded.missing == {
        "age": 1,
        "income": 1,
        "hour": 1,
        "slot": 1,
        "history": 1,
        "category": 2,
        "price": 2,
    }
    inputs = encoded.inputs
    assert inputs["user_cat"][0, 1] == inputs["context_cat"][0, 0] == 0
    for name in ("user_num", "context_num", "history_item", "history_cat", "history_num"):
        assert not inputs[name].any()
    assert inputs["match"][:, 0].tolist() == [0, 0, 0]
    assert encoder.whole_history(empty)["history_item"].shape == (1, 1)


def test_given_values_win_and_null_or_unknown_takes_the_item_tables(encoder: Encoder) -> None:
    columns = {"category": ["food", None, "cheese", "food"], "price": [None, 7, 0, 3]}
    ids = ["item-1", "item-2", "item-3", "new"]
    encoded = encoder.request(replace(REQUEST, item_ids=ids, item_features=columns))
    items = items_of(encoder, encoded)
    assert items["item_cat"][:, 0].tolist() == [3, 3, 1, 3]
    assert items["item_num"][:, 0].tolist() == pytest.approx(
        [math.log(2), math.log(8), 0, math.log(4)]
    )
    assert items["item_num"][:, 1].tolist() == [1, 1, 1, 1]
    assert encoded.missing == {}


def test_a_request_changes_neither_the_item_table_nor_another_requests_arrays(
    encoder: Encoder,
) -> None:
    before = encoder.request(REQUEST)
    changed = replace(REQUEST, item_features={"category": ["food"] * 3, "price": [99] * 3})
    encoded = encoder.request(changed)
    for array in (*encoded.inputs.values(), *items_of(encoder, encoded).values()):
        array[:] = 77
    assert same(encoder.request(REQUEST), before)


def test_the_history_is_newest_first_cut_and_as_the_item_table_knows_it(encoder: Encoder) -> None:
    ages = [50.0, 0.0, 7.5, 3.0, 20.0, 9.0, 3.0]
    items = ["item-0", "item-1", "item-2", "item-3", "item-4", "item-5", "new"]
    request = replace(
        REQUEST,
        history_items=items,
        history_age_days=ages,
        history_count=[float(i) for i in range(7)],
    )
    inputs = encoder.whole_history(request)
    cut = encoder.request(request).inputs
    for name, array in inputs.items():
        assert np.array_equal(cut[name], array[:, :3])  # as many as are attended to
    newest = [1, 3, 6, 2, 5]  # at most five; the first of equals stays first
    assert inputs["history_item"][0].tolist() == hash_ids([items[i] for i in newest]).tolist()
    assert inputs["history_num"][0, :, AGE].tolist() == [ages[i] for i in newest]
    assert inputs["history_num"][0, :, COUNT].tolist() == newest
    assert inputs["history_cat"][0, :, 0].tolist() == [2, 1, 0, 3, 3]


@unhurried
@given(st.lists(st.tuples(st.integers(0, 60), st.floats(0, 1e6), st.integers(0, 1000)), max_size=9))
def test_any_history_becomes_finite_rising_ages_of_items_in_place(
    encoder: Encoder, steps: list[tuple[int, float, int]]
) -> None:
    items, ages, counts = zip(*steps, strict=True) if steps else ((), (), ())
    request = replace(REQUEST, history_items=items, history_age_days=ages, history_count=counts)
    inputs = encoder.whole_history(request)
    kept = sorted(steps, key=lambda step: step[1])[:5]
    if kept:
        assert inputs["history_item"][0].tolist() == hash_ids([s[0] for s in kept]).tolist()
        assert inputs["history_num"][0].tolist() == [[np.float32(a), n] for _, a, n in kept]
    assert np.isfinite(inputs["history_num"]).all()


BAD_NUMBERS = [math.nan, math.inf, -math.inf, 1e300, 10**400, -(10**400), True, "3", [], {}]


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=lambda v: repr(v)[:12])
def test_what_is_not_a_finite_number_is_refused_with_its_path(encoder: Encoder, value: Any) -> None:
    for expected, changes in {
        "user.features.income": {"user_features": {"age": "18-24", "income": value}},
        "context.slot": {"context": {"slot": value}},
        "context.hour": {"context": {"hour": value}},
        "candidates.features.price[1]": {"item_features": {"price": [1.0, value, None]}},
        "candidates.features.price[2]": {"item_features": {"price": [1.0, 2, value]}},
        "user.history.age_days[1]": {"history_age_days": [1, value]},
        "user.history.count[0]": {"history_count": [value, 1]},
    }.items():
        error = refusal(encoder, **changes)
        assert error.field == expected
        assert error.value is value or error.value == value
        assert "number" in error.expected


@pytest.mark.parametrize("value", [1.5, True, b"18-24", ["18-24"], math.nan], ids=repr)
def test_what_is_no_category_is_refused_with_its_path(encoder: Encoder, value: Any) -> None:
    for expected, changes in {
        "user.features.age": {"user_features": {"age": value}},
        "candidates.features.category[1]": {"item_features": {"category": ["food", value, None]}},
    }.items():
        error = refusal(encoder, **changes)
        assert (error.field, error.expected) == (expected, "a string, an integer or null")


@pytest.mark.parametrize("value", [None, 2.0, True, b"item-1"], ids=repr)
def test_what_is_no_id_is_refused_with_its_path(encoder: Encoder, value: Any) -> None:
    for expected, changes in {
        "user.id": {"user_id": value},
        "candidates.id[1]": {"item_ids": ["item-0", value, "item-1"]},
        "user.history.items[0]": {"history_items": [value, "item-1"]},
    }.items():
        error = refusal(encoder, **changes)
        assert (error.field, error.value) == (expected, value)


def test_a_negative_amount_is_refused_where_the_logarithm_is_taken(encoder: Encoder) -> None:
    error = refusal(encoder, user_features={"income": -1})
    assert (error.field, error.value) == ("user.features.income", -1)
    assert error.expected == "a number >= 0"
    error = refusal(encoder, item_features={"price": [3, -0.5, -7]})
    assert (error.field, error.value) == ("candidates.features.price[1]", -0.5)
    assert encoder.request(replace(REQUEST, context={"slot": -1})).inputs["context_num"][0, 0] == -1


def test_a_column_of_one_candidate_carries_its_index_and_a_single_value_does_not(
    encoder: Encoder,
) -> None:
    one = {"item_ids": ["item-1"]}
    for name, bad in (("price", -1), ("price", "x"), ("category", 1.5)):
        error = refusal(encoder, **one, item_features={name: [bad]})
        assert error.field == f"candidates.features.{name}[0]"
    one = {"history_items": [1], "history_age_days": [1], "history_count": [-1]}
    assert refusal(encoder, **one).field == "user.history.count[0]"
    assert refusal(encoder, user_features={"age": 1.5}).field == "user.features.age"
    with pytest.raises(FeatureError, match=r"^price\[0\]: -1 is not"):
        encoder.numeric(encoder.spec["price"], [-1], "price")


@pytest.mark.parametrize("value", [-1, 1_000_001, None])
def test_an_age_or_a_count_out_of_range_is_refused(encoder: Encoder, value: Any) -> None:
    for column in ("age_days", "count"):
        error = refusal(encoder, **{f"history_{column}": [0, value]})
        assert error.field == f"user.history.{column}[1]"
        assert error.expected == "a number in 0 .. 1,000,000"


def test_an_unknown_feature_is_refused_and_the_known_ones_are_named(encoder: Encoder) -> None:
    for field, where, known in (
        ("user.features", "user_features", "age, income"),
        ("context", "context", "hour, slot"),
        ("candidates.features", "item_features", "category, price"),
    ):
        for name in ("colour", "user_id", "item_id", "history"):
            error = refusal(encoder, **{where: {name: [1, 1, 1]}})
            assert (error.field, error.value, error.expected) == (field, name, f"one of: {known}")


def test_columns_of_unequal_length_are_refused(encoder: Encoder) -> None:
    for expected, changes in {
        "candidates.features.price": {"item_features": {"price": [1, 2]}},
        "user.history.age_days": {"history_age_days": [1]},
        "user.history.count": {"history_count": [1, 2, 3]},
    }.items():
        assert refusal(encoder, **changes).field == expected


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64", "uint8"])
def test_an_array_is_encoded_as_the_list_of_its_values(encoder: Encoder, dtype: str) -> None:
    values = np.array([3, 0, 200], dtype)
    for name in NUMERIC:
        feature = encoder.spec[name]
        given = encoder.numeric(feature, values, name)  # type: ignore[arg-type]
        assert given.tolist() == encoder.numeric(feature, values.tolist(), name).tolist()
    assert values.tolist() == [3, 0, 200]


def test_an_array_that_holds_no_finite_number_is_refused(encoder: Encoder) -> None:
    for values in (np.array([1, np.nan]), np.array(["1", "2"]), np.array([1, "x"], object)):
        with pytest.raises(FeatureError, match=r"price\[\d\]: .* is not a finite number"):
            encoder.numeric(encoder.spec["price"], values, "price")  # type: ignore[arg-type]


def test_a_vocabulary_that_names_a_value_twice_is_refused(encoder: Encoder) -> None:
    values: Sequence[str] = ["a", "b", "a"]
    with pytest.raises(ValueError, match="'age' names a value twice"):
        Encoder(encoder.spec, {"age": values}, encoder.items)


def test_without_a_vocabulary_every_value_is_unknown(encoder: Encoder) -> None:
    bare = Encoder(encoder.spec, {}, encoder.items)
    assert bare.table_size(bare.spec["age"]) == 1
    assert bare.categorical(bare.spec["age"], ["18-24", None], "age").tolist() == [0, 0]
