"""Large embedding tables: a step touches the rows of its batch and nothing else.

Dense Adam reads and writes every row of every table, and two moments of each, for a batch that has
seen a few thousand rows. Here the large tables of one width lie in one block of memory; a batch
gathers from it once, and its gradient is never more than the rows that were gathered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from training.distributed import World

SPARSE_ROWS = 20_000
"""From this many rows on, a table is large."""
SMALL = 1e-4
"""Standard deviation of a large table's first values: what is never seen should say nothing."""
_SEEN = 0.02
"""What a row's sum of squares starts with, in units of a gradient that is summed over a batch, not
averaged. From 0, the first step of a row would be as long as the rate however little it has to say;
so rare rows move less (measured: .0006 nats on rows with a power law)."""


class Table(nn.Embedding):
    """One embedding table. While its network is fitted, a large one is a part of `block`, its row
    0 there being row `start`."""

    block: Block | None = None
    start = 0


class Block:
    """Large tables of one width, one below the other, with row-wise Adagrad.

    Adagrad (Duchi, Hazan and Singer, JMLR 2011) with one sum of squares per row, of the mean over
    its columns, as in FBGEMM and DLRM:

        s[r] += mean(g[r]^2);  w[r] -= rate / sqrt(s[r]) * g[r]
    """

    def __init__(self, tables: list[Table], batch_size: int) -> None:
        """Moves the tables' values into one tensor, of which each table's weight is then a view.
        Gradients will be those of means over `batch_size` rows."""
        first, rows = tables[0].weight, sum(table.num_embeddings for table in tables)
        self.weight = first.detach().new_empty((rows, first.shape[1]))
        self.squares = first.new_full((rows,), _SEEN / batch_size**2)
        # Half as wide is sorted in half the time.
        self._type = torch.int32 if len(self.weight) < 1 << 31 else torch.int64
        self._gathered: list[tuple[Tensor, Tensor]] = []
        start = 0
        for table in tables:
            part = self.weight[start : start + len(table.weight)]
            part.copy_(table.weight.detach())
            table.weight.data = part
            table.block, table.start = self, start
            start += len(part)

    def rows(self, index: Tensor, tables: Sequence[Table]) -> Tensor:
        """float32 [..., F, D] of indices [..., F] of F of the block's tables. What they say of the
        gradient goes into the next `step`."""
        start = torch.tensor([t.start for t in tables], dtype=self._type, device=index.device)
        # Of a weight, so that autograd knows that there is something to learn.
        gathered: Tensor = _Gather.apply(tables[0].weight, index + start, self)  # type: ignore[no-untyped-call]
        return gathered

    def keep(self, row: Tensor, gradient: Tensor) -> None:
        """Keeps what a backward pass says of rows [...], gradients [..., D]."""
        self._gathered.append((row.reshape(-1), gradient.reshape(-1, gradient.shape[-1])))

    @torch.no_grad()
    def step(self, rate: float, world: World) -> None:
        """Updates the rows that were gathered since the last step, by any of the processes."""
        if self._gathered:
            rows, gradients = zip(*self._gathered, strict=True)
            row, gradient = summed(_joined(rows), _joined(gradients))
            self._gathered.clear()
        else:
            row, gradient = self.squares[:0].long(), self.weight[:0]
        if world.size > 1:
            row, gradient = summed(*world.joined(row, gradient))
        square = self.squares.index_select(0, row).add_(gradient.square().mean(1))
        self.squares.index_copy_(0, row, square)
        gradient.mul_(square.rsqrt_().mul_(-rate)[:, None])
        self.weight.index_copy_(0, row, gradient.add_(self.weight.index_select(0, row)))


class _Gather(torch.autograd.Function):
    """Rows of a block, whose gradient stays as small as they are."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, row: Tensor, block: Block) -> Tensor:
        ctx.row, ctx.block = row, block
        gathered = block.weight.index_select(0, row.reshape(-1))
        return gathered.view(*row.shape, block.weight.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.block.keep(ctx.row, gradient)
        return None, None, None


def summed(row: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ones of rows [n], in order, and the sum of each one's gradients [n, D]."""
    in_order, place = torch.sort(row)
    first = torch.ones_like(in_order, dtype=torch.bool)
    torch.ne(in_order[1:], in_order[:-1], out=first[1:])
    start = first.nonzero()[:, 0]
    # A bag sums what it gathers, so the gradients are never put into order.
    total = embedding_bag(place, gradient, start, mode="sum")
    return in_order.index_select(0, start).long(), total


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One after the other; what is alone is not copied."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


@contextmanager
def merged(tables: Iterable[nn.Module], batch_size: int) -> Iterator[list[Block]]:
    """The large ones of a network's tables as blocks, one per width, until the end of the context;
    each table's weight stays what it is: the same name, the same shape, the values of now."""
    by_width: dict[int, list[Table]] = {}
    for table in tables:
        if isinstance(table, Table) and table.num_embeddings >= SPARSE_ROWS:
            by_width.setdefault(table.embedding_dim, []).append(table)
    try:
        yield [Block(large, batch_size) for large in by_width.values()]
    finally:
        for large in by_width.values():
            for table in large:
                table.block = None
