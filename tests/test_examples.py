"""Rows as arrays: joined with what belongs to their day, and equal to what a request becomes."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import numpy as np
import polars as pl
import pytest
import tiny
import torch

from bundle.encode import Encoder, Request
from bundle.golden import body_of, request_of
from training.events import EventLog, Ints
from training.examples import Batch, Builder, Examples, builder_for, month_before
from training.export import item_table, whole_inputs
from training.layers import HardMatch
from training.requests import RequestMaker
from training.workspace import Workspace

DAY = date(2017, 4, 3)


@pytest.fixture(scope="module")
def builder(tiny_workspace: Workspace, tiny_log: EventLog) -> Builder:
    return builder_for(tiny_workspace, tiny_log, date(2017, 3, 25), tiny.LAST)


def made(log: EventLog, builder: Builder, day: date) -> list[tuple[Request, pl.DataFrame]]:
    return list(RequestMaker(log, builder, day).requests(log.full_lists([day])))


def whole(examples: Examples) -> Batch:
    return examples.batch(np.arange(len(examples)))


def history_of(encoded: dict[str, np.ndarray], name: str, length: int) -> np.ndarray:
    """The newest `length` steps of an encoded history, padded."""
    column = encoded[name][0]
    padded = np.zeros((length, *column.shape[1:]), column.dtype)
    padded[: len(column)] = column[:length]
    return padded


def test_a_request_becomes_the_arrays_of_its_rows(tiny_log: EventLog, builder: Builder) -> None:
    """One encoder: what training reads of a day and what the service reads is the same."""
    encoder = Encoder(tiny_log.spec, tiny_log.vocabulary, item_table(tiny_log, builder, DAY))
    columns = [
        [f.name for f in tiny_log.spec.of("item", "categorical")].index(name)
        for name in tiny_log.spec.history.match
    ]
    match, attend = HardMatch(columns), tiny_log.spec.history.attend
    pairs = made(tiny_log, builder, DAY)
    assert len(pairs) > 5
    for request, rows in pairs:
        inputs = whole_inputs(encoder, request)
        batch = {name: t.numpy() for name, t in whole(builder.build(rows)).items()}
        for name in ("user_cat", "user_num", "context_cat", "context_num"):
            expected = np.repeat(inputs[name], len(rows), axis=0)
            np.testing.assert_array_equal(batch[name], expected, name)
        for name in ("item_key", "item_cat", "item_num"):
            np.testing.assert_array_equal(batch[name], inputs[name], name)
        for name in ("history_item", "history_cat", "history_num"):
            expected = history_of(inputs, name, attend)
            assert all(np.array_equal(row, expected) for row in batch[name]), name
        names = ("history_item", "history_cat", "history_num", "item_key", "item_cat")
        found = match(*(torch.from_numpy(inputs[name]) for name in names)).numpy()
        np.testing.assert_array_equal(batch["match"], found)
        np.testing.assert_allclose(inputs["match"], found, rtol=1e-6, atol=1e-6)


def test_a_request_survives_the_way_through_json(tiny_log: EventLog, builder: Builder) -> None:
    for request, _ in made(tiny_log, builder, DAY):
        assert body_of(request_of(body_of(request))) == body_of(request)


def test_a_request_names_only_what_is_known_and_only_features_of_the_spec(
    tiny_log: EventLog, builder: Builder
) -> None:
    spec = tiny_log.spec
    for request, rows in made(tiny_log, builder, DAY):
        assert list(request.item_ids) == rows["item_id"].to_list()
        assert {"user_taken_7d", "user_ad_rate_30d"} <= request.user_features.keys()
        assert set(request.user_features) <= spec.names("user") - {"user_id", "history"}
        assert set(request.context) == {"hour", "page_size"}
        assert set(request.item_features) == {"slot", "page_same_kind"}
        assert None not in request.user_features.values()


def test_windows_are_those_of_the_store_for_the_month_before(
    tiny_workspace: Workspace, tiny_log: EventLog, builder: Builder
) -> None:
    days = [date(2017, 3, 31), date(2017, 4, 1)]
    rows = tiny_log.rows("ad", *days)
    batch = whole(builder.build(rows))
    tables = tiny_workspace.windows(tiny_log, ["2017-02", "2017-03"])
    user = tiny_log.users.rows(rows["user_id"].to_numpy())
    item = tiny_log.items.rows(rows["item_id"].to_numpy())
    for day, month in zip(days, ("2017-02", "2017-03"), strict=True):
        own = rows["date"].to_numpy() == np.datetime64(day)
        assert own.any()
        for side, table, row in (
            ("user", tables[month].users, user),
            ("item", tables[month].items, item),
        ):
            found, present = batch[f"{side}_window"][own], batch[f"{side}_window_present"][own]
            np.testing.assert_array_equal(found, table.vectors[row[own]])
            np.testing.assert_array_equal(present, table.present[row[own]])
            assert present.any()


def test_without_tpm_there_are_no_windows(tiny_workspace: Workspace, tiny_log: EventLog) -> None:
    builder = builder_for(tiny_workspace, tiny_log, DAY, DAY, with_tpm=False)
    examples = builder.build(tiny_log.rows("ad", DAY, DAY))
    assert examples.window_dim == 0
    assert not whole(examples)["user_window_present"].any()
    assert not whole(examples)["item_window_present"].any()


def test_a_day_whose_window_is_not_given_sees_an_absent_one(
    tiny_workspace: Workspace, tiny_log: EventLog
) -> None:
    february = tiny_workspace.windows(tiny_log, ["2017-02"])
    examples = Builder(tiny_log, february, tiny.LAST).build(
        tiny_log.rows("ad", date(2017, 3, 31), date(2017, 4, 1))
    )
    present = whole(examples)["item_window_present"].any(1).numpy()
    np.testing.assert_array_equal(present, examples.day < np.datetime64("2017-04-01"))
    assert examples.window_dim == tiny.RECIPE.tpm.dim


def test_several_days_together_are_the_days_one_by_one(
    tiny_log: EventLog, builder: Builder
) -> None:
    """Sides and window tables are shared and renumbered when days are joined."""
    rows = tiny_log.rows("natural", date(2017, 3, 30), date(2017, 4, 2))
    together = builder.build(rows)
    apart = [builder.build(part) for part in rows.partition_by("date", maintain_order=True)]
    for name, tensor in whole(together).items():
        expected = torch.cat([whole(part)[name] for part in apart])
        assert torch.equal(tensor, expected), name
    for name in ("label", "weight", "user_row", "request_id", "day"):
        expected_rows = np.concatenate([getattr(part, name) for part in apart])
        np.testing.assert_array_equal(getattr(together, name), expected_rows)


def test_a_batch_is_the_rows_asked_for_in_their_order(tiny_log: EventLog, builder: Builder) -> None:
    examples = builder.build(tiny_log.rows("ad", DAY, date(2017, 4, 4)))
    rows: Ints = np.array([7, 0, 7, 3])
    for name, tensor in examples.batch(rows).items():
        assert torch.equal(tensor, whole(examples)[name][rows]), name


def test_since_keeps_the_rows_of_the_day_and_later(tiny_log: EventLog, builder: Builder) -> None:
    examples = builder.build(tiny_log.rows("ad", date(2017, 3, 30), DAY))
    recent = examples.since(date(2017, 4, 2))
    kept = np.flatnonzero(examples.day >= np.datetime64("2017-04-02"))
    assert 0 < len(recent) == len(kept) < len(examples)
    for name, tensor in whole(recent).items():
        assert torch.equal(tensor, examples.batch(kept)[name]), name


def test_labels_and_weights_are_those_of_the_log(tiny_log: EventLog, builder: Builder) -> None:
    rows = tiny_log.rows("ad", DAY, DAY)
    examples = builder.build(rows)
    np.testing.assert_array_equal(examples.label, rows["label"].to_numpy())
    np.testing.assert_array_equal(examples.weight, rows["sample_weight"].to_numpy())
    assert examples.weight.max() > 1
    assert examples.request_id.tolist() == rows["request_id"].to_list()


def test_a_row_that_says_nothing_of_an_item_leaves_what_the_item_table_knows(
    tiny_log: EventLog, builder: Builder
) -> None:
    rows = tiny_log.rows("ad", DAY, DAY)
    kinds = rows.with_columns(kind=pl.lit(None, pl.String))
    plain, silent = builder.build(rows), builder.build(kinds)
    np.testing.assert_array_equal(plain.item_cat, silent.item_cat)
    other = builder.build(rows.with_columns(kind=pl.lit("soap")))
    column = [f.name for f in tiny_log.spec.of("item", "categorical")].index("kind")
    assert len(set(other.item_cat[:, column].tolist())) == 1
    untouched = replace(other, item_cat=plain.item_cat, match=plain.match)
    np.testing.assert_array_equal(untouched.item_num, plain.item_num)


@pytest.mark.parametrize(
    ("day", "month"),
    [
        (date(2017, 4, 1), "2017-03"),
        (date(2017, 4, 30), "2017-03"),
        (date(2017, 1, 1), "2016-12"),
        (date(2017, 12, 31), "2017-11"),
    ],
)
def test_a_day_sees_the_month_that_ended_before_it(day: date, month: str) -> None:
    assert month_before(day) == month
