"""Layers against slow loops, and against inputs that must not matter."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bundle.encode import AGE, COUNT
from bundle.match import DECAY_DAYS, MATCH_VALUES, NEVER_DAYS, RECENT_DAYS, History
from training.aggregators import SelfAttention
from training.events import EventLog
from training.layers import (
    FieldEmbeddings,
    HardMatch,
    Numbers,
    SplitLinear,
    Standardise,
    TargetAttention,
)

unhurried = settings(deadline=None, max_examples=50)
FEW = st.integers(0, 3)
"""Small numbers, so that there are matches; 0 is padding or missing."""


def slow_level(history: list[int], ages: list[float], counts: list[float], wanted: int) -> Tensor:
    """What `HardMatch` says of one candidate at one level: its numbers in its order."""
    same = [i for i, value in enumerate(history) if value == wanted and value != 0]
    numbers = [
        float(bool(same)),
        math.log1p(len(same)),
        math.log1p(sum(counts[i] for i in same)),
        math.log1p(sum(counts[i] * math.exp(-ages[i] / DECAY_DAYS) for i in same)),
        math.log1p(sum(math.exp(-ages[i] / RECENT_DAYS) for i in same)),
        math.log1p(min((ages[i] for i in same), default=NEVER_DAYS)),
    ]
    assert len(numbers) == MATCH_VALUES
    return torch.tensor(numbers)


NO_MATCH = slow_level([], [], [], 1)


@st.composite
def matches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A history with padding at its end, and candidates of two matched features."""
    num, padding, candidates = draw(st.integers(0, 6)), draw(st.integers(0, 3)), 5
    num += not num + padding
    items = draw(st.lists(st.integers(1, 4), min_size=num, max_size=num)) + [0] * padding
    kinds = [[draw(FEW), draw(FEW)] if item else [0, 0] for item in items]
    numbers = [[draw(st.integers(0, 90)), draw(st.integers(1, 9))] if i else [0, 0] for i in items]
    return (
        torch.tensor(items)[None],
        torch.tensor(kinds, dtype=torch.int32)[None],
        torch.tensor(numbers, dtype=torch.float32)[None],
        torch.tensor([draw(st.integers(1, 4)) for _ in range(candidates)]),
        torch.tensor([[9, draw(FEW), 9, draw(FEW)] for _ in range(candidates)], dtype=torch.int32),
    )


@unhurried
@given(matches())
def test_hard_match_is_what_a_slow_loop_finds(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    match = HardMatch([3, 1])
    history_item, history_cat, history_num, item_key, item_cat = inputs
    found = match(*inputs)
    assert found.shape == (len(item_key), match.width)
    ages, counts = history_num[0, :, AGE].tolist(), history_num[0, :, COUNT].tolist()
    columns = [history_item[0].tolist(), *(history_cat[0, :, m].tolist() for m in range(2))]
    length = math.log1p(sum(item > 0 for item in columns[0]))
    for row in range(len(item_key)):
        wanted = [int(item_key[row]), int(item_cat[row, 3]), int(item_cat[row, 1])]
        levels = [
            slow_level(column, ages, counts, value)
            for column, value in zip(columns, wanted, strict=True)
        ]
        totals = torch.tensor([length, math.log1p(sum(counts))])
        expected = torch.cat([*levels, totals])
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


@unhurried
@given(matches())
def test_serving_matches_as_training_does(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    history_item, history_cat, history_num, item_key, item_cat = (part.numpy() for part in inputs)
    real = history_item[0] > 0  # serving has no padding
    newest = np.argsort(history_num[0, real, AGE], kind="stable")
    ages, counts = history_num[0, real][newest].astype(np.float64).T
    kinds = history_cat[0, real][newest]
    levels = [(history_item[0, real][newest], item_key)]
    levels += [(kinds[:, m], item_cat[:, column]) for m, column in enumerate([3, 1])]
    found = torch.from_numpy(History(ages, counts).match(levels))
    torch.testing.assert_close(found, HardMatch([3, 1])(*inputs), atol=1e-5, rtol=1e-5)


def a_history(length: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    items = torch.arange(1, length + 1)[None]
    kinds = torch.tensor([[1 + i % 2] for i in range(length)], dtype=torch.int32)[None]
    numbers = torch.tensor([[1.0 + i, 2.0] for i in range(length)])[None]
    return items, kinds, numbers


def test_more_padding_changes_no_match() -> None:
    history, match = a_history(), HardMatch([0])
    padded = [torch.cat([part, torch.zeros_like(part)], dim=1) for part in history]
    candidates = torch.tensor([1, 2, 9]), torch.tensor([[1], [2], [3]], dtype=torch.int32)
    torch.testing.assert_close(match(*padded, *candidates), match(*history, *candidates))


def test_a_missing_feature_matches_nothing_not_even_a_missing_one() -> None:
    items, kinds, numbers = a_history()
    missing = torch.zeros(2, 1, dtype=torch.int32)
    found = HardMatch([0])(items, torch.zeros_like(kinds), numbers, torch.tensor([1, 9]), missing)
    of_item, of_kind = found[:, :MATCH_VALUES], found[:, MATCH_VALUES : 2 * MATCH_VALUES]
    torch.testing.assert_close(of_kind, NO_MATCH.expand(2, MATCH_VALUES))
    torch.testing.assert_close(of_item[1], NO_MATCH)
    assert not torch.allclose(of_item[0], NO_MATCH)


def test_an_empty_history_matches_nothing_and_is_finite() -> None:
    empty = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int32)
    candidates = torch.tensor([1, 2]), torch.zeros(2, 1, dtype=torch.int32)
    found = HardMatch([0])(*empty, torch.zeros(1, 1, 2), *candidates)
    expected = torch.cat([NO_MATCH, NO_MATCH, torch.zeros(2)])
    torch.testing.assert_close(found, expected.expand(2, len(expected)))


def test_how_old_an_item_is_does_not_depend_on_the_others() -> None:
    items, kinds, numbers = a_history(2)
    numbers[..., AGE] = 2 * NEVER_DAYS
    candidates = torch.tensor([1]), torch.zeros(1, 1, dtype=torch.int32)
    both = HardMatch([0])(items, kinds, numbers, *candidates)
    alone = HardMatch([0])(items[:, :1], kinds[:, :1], numbers[:, :1], *candidates)
    torch.testing.assert_close(both[:, :MATCH_VALUES], alone[:, :MATCH_VALUES])


def test_a_match_depends_on_its_own_candidate_only() -> None:
    history, match = a_history(), HardMatch([0])
    keys, kinds = torch.tensor([4, 2, 9]), torch.tensor([[1], [2], [0]], dtype=torch.int32)
    together = match(*history, keys, kinds)
    alone = [match(*history, keys[i : i + 1], kinds[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def self_attention() -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(5, 3)


def attention() -> TargetAttention:
    torch.manual_seed(0)
    return TargetAttention(4, 6, 8)


def test_attention_over_an_empty_history_is_finite_and_the_same_for_every_candidate() -> None:
    layer, targets = attention(), torch.randn(3, 4)
    found = [
        layer(targets, content, torch.zeros(len(content), 5, dtype=torch.bool))
        for content in (torch.zeros(1, 5, 6), torch.randn(1, 5, 6), torch.randn(3, 5, 6))
    ]
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[0][:1].expand(3, layer.width))
    assert all(torch.equal(one, found[0]) for one in found)


def test_one_user_broadcast_is_the_user_repeated() -> None:
    layer, targets, steps = attention(), torch.randn(7, 4), torch.randn(1, 5, 6)
    present = torch.tensor([[True, True, True, False, False]])
    broadcast = layer(targets, steps, present)
    repeated = layer(targets, steps.expand(7, 5, 6), present.expand(7, 5))
    torch.testing.assert_close(broadcast, repeated)
    assert broadcast.shape == (7, layer.width)


def test_padding_has_no_share_of_the_attention() -> None:
    layer, targets, steps = attention(), torch.randn(3, 4), torch.randn(1, 5, 6)
    present = torch.tensor([[True, True, True, False, False]])
    other = torch.where(present[..., None], steps, 1e3)
    torch.testing.assert_close(layer(targets, steps, present), layer(targets, other, present))
    short = layer(targets, steps[:, :3], present[:, :3])
    torch.testing.assert_close(layer(targets, steps, present), short)


def test_the_steps_that_are_there_matter() -> None:
    layer, targets, steps = attention(), torch.randn(3, 4), torch.randn(1, 2, 6)
    present = torch.ones(1, 2, dtype=torch.bool)
    assert not torch.allclose(layer(targets, steps, present), layer(targets, steps + 1, present))


def test_standardised_columns_have_mean_zero_and_deviation_one() -> None:
    layer, rows = Standardise(3), torch.randn(1000, 3) * torch.tensor([0.1, 1, 50]) + 3
    layer.fit(rows)
    found = layer(rows)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.std(0), torch.ones(3), atol=0.02, rtol=0)


def test_a_constant_column_and_an_outlier_stay_small() -> None:
    layer = Standardise(2)
    layer.fit(torch.tensor([[5.0, 0.0], [5.0, 1.0], [5.0, 2.0]]))
    found = layer(torch.tensor([[5.0, 1e6], [5.1, -1e6], [1e6, 0.0]]))
    assert found[0, 0] == 0
    assert found.isfinite().all()
    assert found.abs().max() < 100


def test_statistics_are_no_parameters_and_are_kept_with_the_model() -> None:
    layer = Standardise(2)
    assert not list(layer.parameters())
    layer.fit(torch.randn(50, 2) * 4 + 1)
    copy = Standardise(2)
    copy.load_state_dict(layer.state_dict())
    rows = torch.randn(5, 2)
    assert torch.equal(copy(rows), layer(rows))


def pairs(values: Tensor, present: Tensor) -> Tensor:
    """Encoded numeric features: a value and a presence mark each."""
    return torch.stack([values, present.float()], dim=2).flatten(1)


def test_what_stands_in_place_of_a_missing_number_never_matters() -> None:
    torch.manual_seed(0)
    values, present = torch.randn(200, 3) * 5 + 2, torch.rand(200, 3) > 0.3
    layer, other = Numbers(3), Numbers(3)
    layer.fit(pairs(values, present))
    elsewhere = torch.where(present, values, 1e4)
    other.fit(pairs(elsewhere, present))
    expected = layer(pairs(values, present))
    torch.testing.assert_close(other(pairs(elsewhere, present)), expected)
    assert expected.shape == (200, layer.width)


def test_a_missing_number_is_not_one_that_is_zero_or_the_mean() -> None:
    layer, known = Numbers(1), torch.ones(3, 1, dtype=torch.bool)
    values = torch.tensor([[0.0], [2.0], [4.0]])
    layer.fit(pairs(values, known))
    missing = layer(pairs(torch.zeros(1, 1), ~known[:1]))[0]
    assert all(not torch.allclose(row, missing) for row in layer(pairs(values, known)))


def test_a_number_that_is_missing_everywhere_is_fitted_without_harm() -> None:
    layer, absent = Numbers(2), torch.zeros(5, 2, dtype=torch.bool)
    layer.fit(pairs(torch.zeros(5, 2), absent))
    for present in (absent, ~absent):
        assert layer(pairs(torch.full((5, 2), 3.0), present)).isfinite().all()


def test_a_split_map_is_one_map_of_both_sides_together() -> None:
    torch.manual_seed(0)
    layer, user, item = SplitLinear(3, 4, 2), torch.randn(6, 3), torch.randn(6, 4)
    whole = nn.Linear(7, 2)
    with torch.no_grad():
        whole.weight.copy_(torch.cat([layer.user.weight, layer.item.weight], dim=1))
        whole.bias.copy_(layer.user.bias)
    torch.testing.assert_close(layer(user, item), whole(torch.cat([user, item], dim=1)))
    torch.testing.assert_close(layer(user[:1], item), layer(user[:1].expand(6, 3), item))


def fields(log: EventLog, names: list[str], tables: nn.ModuleDict) -> FieldEmbeddings:
    return FieldEmbeddings([log.spec[name] for name in names], log.encoder, tables)


def test_features_that_name_the_same_table_share_it(tiny_log: EventLog) -> None:
    tables = nn.ModuleDict()
    first, second = fields(tiny_log, ["kind", "slot"], tables), fields(tiny_log, ["kind"], tables)
    assert set(tables) == {"kind", "slot"}
    index = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)
    assert torch.equal(first(index)[:, : second.width], second(index[:, :1]))


def test_a_feature_for_tpm_alone_has_no_columns_and_no_table(tiny_log: EventLog) -> None:
    tables = nn.ModuleDict()
    layer = fields(tiny_log, ["item_id", "slot"], tables)
    assert "item_id" not in tables
    found = layer(torch.tensor([[200, 1], [3, 1]], dtype=torch.int32))
    assert found.shape == (2, layer.width) == (2, tiny_log.spec["slot"].dim)
    assert torch.equal(found[0], found[1])


def test_no_features_at_all_are_no_columns(tiny_log: EventLog) -> None:
    layer = fields(tiny_log, ["user_id"], nn.ModuleDict())
    assert layer(torch.tensor([[3], [4]], dtype=torch.int32)).shape == (2, 0)


Layer = Callable[[], nn.Module]


@pytest.mark.parametrize("make", [self_attention, attention])
def test_a_layer_is_the_same_under_a_seed(make: Layer) -> None:
    first, second = make().state_dict(), make().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
