"""Large tables: one block of memory, row-wise Adagrad, and the same tensors from outside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bundle.spec import Feature
from training.distributed import World
from training.events import EventLog
from training.layers import FieldEmbeddings
from training.tables import SPARSE_ROWS, Block, Table, merged, summed

LARGE = SPARSE_ROWS
RATE, BATCH = 0.1, 40
SIZES = {
    "a": (LARGE, 3),
    "small": (50, 3),
    "b": (LARGE + 7, 3),
    "c": (LARGE, 3),
    "wide": (LARGE, 5),
}
"""Rows and width of tables; a run of two, one that stands alone, and one of another width."""


def made(log: EventLog, sizes: dict[str, tuple[int, int]]) -> tuple[FieldEmbeddings, nn.ModuleDict]:
    """Embeddings of features `NAME` or `NAME.more`, which has the same table, and the tables."""
    torch.manual_seed(0)
    features = [
        Feature(name, "item", "categorical", "hash", dim, rows, table=name.split(".")[0])
        for name, (rows, dim) in sizes.items()
    ]
    tables = nn.ModuleDict()
    return FieldEmbeddings(features, log.encoder, tables), tables


def indices(sizes: dict[str, tuple[int, int]], num: int, seed: int = 0) -> Tensor:
    """int32 [num, F]; few rows, so that they repeat, and each table's last one."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, 6, (num,), generator=generator) for _ in sizes]
    for column, (rows, _) in zip(columns, sizes.values(), strict=True):
        column[0] = rows - 1
    return torch.stack(columns, 1).int()


def slow_steps(weight: Tensor, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Row-wise Adagrad, by its formula, a row at a time: weight [n, D], rows [m] and their
    gradients [m, D] of each step."""
    weight, squares = weight.clone(), torch.full((len(weight),), 0.02 / BATCH**2)
    for rows, gradients in steps:
        for row in set(rows.tolist()):
            gradient = gradients[rows == row].sum(0)
            squares[row] += gradient.square().mean()
            weight[row] -= RATE * gradient / squares[row].sqrt()
    return weight


def test_a_fitted_network_reads_the_rows_that_its_tables_have(tiny_log: EventLog) -> None:
    fields, tables = made(tiny_log, SIZES)
    index = indices(SIZES, 40)
    alone = [
        tables[name].weight[index[:, i].long()]  # type: ignore[index]
        for i, name in enumerate(SIZES)
    ]
    expected = torch.cat(alone, 1).detach()
    with merged(tables.values(), BATCH) as blocks:
        assert [block.weight.shape for block in blocks] == [(3 * LARGE + 7, 3), (LARGE, 5)]
        assert torch.equal(fields.train()(index), expected)
        assert torch.equal(fields.eval()(index), expected)
    assert torch.equal(fields.train()(index), expected)


def test_steps_are_those_of_row_wise_adagrad(tiny_log: EventLog) -> None:
    fields, tables = made(tiny_log, SIZES)
    before = copy.deepcopy(tables)
    factors = torch.randn(fields.width, generator=torch.Generator().manual_seed(1))
    steps = [indices(SIZES, 40, seed) for seed in range(3)]
    with merged(tables.values(), BATCH) as blocks:
        for index in steps:
            (fields.train()(index) * factors).square().sum().backward()
            for block in blocks:
                block.step(RATE, World())
    for name in ("a", "b", "c", "wide"):
        column = list(SIZES).index(name)
        start = sum(dim for _, dim in list(SIZES.values())[:column])
        own = factors[start : start + SIZES[name][1]]
        weight, seen = before[name].weight.detach(), []
        for index in steps:
            rows = index[:, column].long()
            # The gradient of a step is that of the weights that the steps before it left.
            seen.append((rows, 2 * weight[rows] * own.square()))
            weight = slow_steps(before[name].weight.detach(), seen)
        torch.testing.assert_close(tables[name].weight.detach(), weight, atol=1e-6, rtol=1e-5)


def test_rows_that_no_batch_touched_stay_and_no_gradient_has_the_size_of_a_table(
    tiny_log: EventLog,
) -> None:
    fields, tables = made(tiny_log, SIZES)
    before = copy.deepcopy(tables)
    index = indices(SIZES, 40)
    with merged(tables.values(), BATCH) as blocks:
        fields.train()(index).square().sum().backward()
        assert all(tables[name].weight.grad is None for name in ("a", "b", "c", "wide"))
        assert tables["small"].weight.grad is not None
        for block in blocks:
            block.step(RATE, World())
    for i, name in enumerate(SIZES):
        moved = (tables[name].weight != before[name].weight).any(1).nonzero()[:, 0]
        expected = set() if name == "small" else set(index[:, i].tolist())
        assert set(moved.tolist()) == expected


def test_features_that_share_a_table_teach_the_same_rows(tiny_log: EventLog) -> None:
    sizes = {"a": (LARGE, 3), "a.more": (LARGE, 3)}
    fields, tables = made(tiny_log, sizes)
    weight = tables["a"].weight.detach().clone()
    index = torch.tensor([[4, 9], [9, 9]], dtype=torch.int32)
    with merged(tables.values(), BATCH) as blocks:
        fields.train()(index).sum().backward()
        blocks[0].step(RATE, World())
    rows = index.flatten().long()
    expected = slow_steps(weight, [(rows, torch.ones(len(rows), 3))])
    torch.testing.assert_close(tables["a"].weight.detach(), expected)


def test_what_is_detached_teaches_nothing(tiny_log: EventLog) -> None:
    fields, tables = made(tiny_log, {"a": (LARGE, 3)})
    weight = tables["a"].weight.detach().clone()
    with merged(tables.values(), BATCH) as blocks:
        fields.train()(indices({"a": (LARGE, 3)}, 5)).detach()
        learned = fields(torch.tensor([[2]], dtype=torch.int32))
        learned.sum().backward()
        blocks[0].step(RATE, World())
    moved = (tables["a"].weight != weight).any(1).nonzero()[:, 0]
    assert moved.tolist() == [2]


def test_a_step_uses_up_what_was_learned(tiny_log: EventLog) -> None:
    fields, tables = made(tiny_log, {"a": (LARGE, 3)})
    with merged(tables.values(), BATCH) as blocks:
        fields.train()(indices({"a": (LARGE, 3)}, 5)).sum().backward()
        blocks[0].step(RATE, World())
        after = blocks[0].weight.clone()
        blocks[0].step(RATE, World())
        assert torch.equal(blocks[0].weight, after)


def test_tables_keep_their_names_and_shapes_and_load_what_another_network_learned(
    tiny_log: EventLog,
) -> None:
    (fields, tables), (_, other) = made(tiny_log, SIZES), made(tiny_log, SIZES)
    shapes = {name: tensor.shape for name, tensor in tables.state_dict().items()}
    assert shapes["b.weight"] == (LARGE + 7, 3)
    with merged(tables.values(), BATCH) as blocks:
        assert {n: t.shape for n, t in tables.state_dict().items()} == shapes
        fields.train()(indices(SIZES, 9)).sum().backward()
        for block in blocks:
            block.step(RATE, World())
    assert not torch.equal(other["b"].weight, tables["b"].weight)
    other.load_state_dict(tables.state_dict())
    assert all(torch.equal(other[name].weight, tables[name].weight) for name in SIZES)


def test_what_is_loaded_into_a_table_is_what_its_block_reads(tiny_log: EventLog) -> None:
    fields, tables = made(tiny_log, {"a": (LARGE, 3), "b": (LARGE, 3)})
    index = indices({"a": (LARGE, 3), "b": (LARGE, 3)}, 4)
    with merged(tables.values(), BATCH):
        tables.load_state_dict({k: torch.ones_like(v) for k, v in tables.state_dict().items()})
        assert torch.equal(fields.train()(index), torch.ones(4, 6))


def test_blocks_end_with_their_context_also_when_it_fails(tiny_log: EventLog) -> None:
    _, tables = made(tiny_log, SIZES)
    seen = []

    def fail() -> None:
        with merged(tables.values(), BATCH) as blocks:
            seen.append(tables["a"].block is blocks[0])
            blocks[0].step(1 / 0, World())

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [True]
    assert all(table.block is None for table in tables.values())  # type: ignore[union-attr]


def test_a_table_that_is_not_large_is_in_no_block() -> None:
    tables = [Table(LARGE - 1, 2), Table(LARGE, 2)]
    with merged(tables, BATCH) as blocks:
        assert [block.weight.shape for block in blocks] == [(LARGE, 2)]
        assert [table.block is None for table in tables] == [True, False]


def test_a_network_without_large_tables_has_no_blocks() -> None:
    with merged([Table(10, 2)], BATCH) as blocks:
        assert blocks == []


def test_rows_are_summed_once_each_in_order() -> None:
    row = torch.tensor([5, 1, 5, 9, 1, 5], dtype=torch.int32)
    gradient = torch.arange(12.0).view(6, 2)
    rows, total = summed(row, gradient)
    assert rows.tolist() == [1, 5, 9]
    assert total.tolist() == [[10.0, 12.0], [14.0, 17.0], [6.0, 7.0]]


def test_a_block_of_no_rows_steps(tiny_log: EventLog) -> None:
    """As where one of several processes has touched none."""
    table = Table(4, 2)
    block, before = Block([table], BATCH), table.weight.detach().clone()
    block.step(RATE, World())
    assert torch.equal(table.weight, before)
