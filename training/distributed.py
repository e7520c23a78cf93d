"""Several processes that train one model, as `torchrun` starts them.

Each process reads its share of the days and takes its share of every batch; the sum of their
gradients is that of the whole batch, so all of them make the same step. The first one writes.
"""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor, distributed, nn

from bundle.spec import Domain
from training.events import EventLog, Ints, days_between

_T = TypeVar("_T")

DEVICE = "ECDCTR_DEVICE"
"""Environment variable: where networks are fitted. `cpu` by default, `cuda`, `cuda:1`, or `auto`,
which is a GPU where there is one."""


class DistributedError(ValueError):
    """The processes do not fit the work, or have come apart; the message says how."""


@dataclass(frozen=True)
class World:
    """The processes of a run. With one, which is the rule, nothing here does anything."""

    rank: int = 0
    size: int = 1

    def days(self, days: Sequence[date]) -> list[date]:
        """The days whose rows this process reads: every `size`-th one.

        Raises:
            DistributedError: there are fewer days than processes.
        """
        if len(days) < self.size:
            raise DistributedError(
                f"{len(days)} days from {days[0]} on are too few for {self.size} processes;"
                f" start at most {len(days)}"
            )
        return list(days[self.rank :: self.size])

    def batches(self, order: Ints, size: int) -> list[Ints]:
        """Rows in batches of `size`; of several processes each has as many batches, with its share
        of the `size` rows in each.

        Raises:
            DistributedError: this process has fewer rows than there are batches.
        """
        if self.size == 1:
            return [order[start : start + size] for start in range(0, len(order), size)]
        num = math.ceil(self.sum(len(order)) / size)
        if len(order) < num:
            raise DistributedError(f"process {self.rank} has {len(order)} rows for {num} batches")
        return np.array_split(order, num)

    def share(self, num: int) -> float:
        """The share of this process's `num` rows in those of all."""
        return num / self.sum(num)

    def sum(self, value: float) -> float:
        """The sum of every process's value."""
        return float(self._reduced(torch.tensor(value, dtype=torch.float64)))

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by the sum of every process's, all in one message."""
        own = list(tensors)
        if self.size == 1 or not own:
            return
        flat = self._reduced(torch.cat([tensor.reshape(-1) for tensor in own]))
        totals = torch.split(flat, [tensor.numel() for tensor in own])
        for tensor, total in zip(own, totals, strict=True):
            tensor.copy_(total.view_as(tensor))

    def any(self, mask: Tensor) -> None:
        """Sets each bool to whether any process has it set."""
        if self.size > 1:
            mask.copy_(self._reduced(mask.to(torch.int32)) > 0)

    def joined(self, row: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Every process's rows int64 [n] and gradients float32 [n, D], one after the other."""
        sizes = row.new_zeros(self.size)
        sizes[self.rank] = len(row)
        counts: list[int] = self._reduced(sizes).tolist()
        return self._joined(row, counts), self._joined(gradient, counts)

    def follow_first(self, model: nn.Module) -> None:
        """Gives a model of every process the tensors of the first one's."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, 0)

    def verify(self, model: nn.Module, name: str) -> None:
        """Raises:
        DistributedError: the processes do not have the same model, bit by bit.
        """
        if self.size == 1:
            return
        for key, tensor in model.state_dict().items():
            first = tensor.clone()
            distributed.broadcast(first, 0)
            differs = torch.tensor(not torch.equal(first, tensor), dtype=torch.float64)
            if self._reduced(differs.to(tensor.device)) > 0:
                raise DistributedError(f"{name}: the processes ended with different {key}")

    def in_turn(self, make: Callable[[], _T]) -> _T:
        """What `make` gives each process; the first one makes it, and publishes what that takes,
        before the others do."""
        if self.size == 1:
            return make()
        made = [make()] if self.rank == 0 else []
        distributed.barrier()
        return made[0] if made else make()

    def first_only(self, write: Callable[[], object]) -> None:
        """Lets the first process write; the others go on when it has."""
        if self.rank == 0:
            write()
        if self.size > 1:
            distributed.barrier()

    def _joined(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        # Messages have one size, so each is as long as the longest.
        padded = own.new_zeros((max(counts), *own.shape[1:]))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def _reduced(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor


def own_rows(log: EventLog, domain: Domain, first: date, last: date) -> pl.DataFrame:
    """The rows of a domain dated first .. last that this process learns from, by date."""
    team = world()
    if team.size == 1:
        return log.rows(domain, first, last)
    return pl.concat([log.rows(domain, day, day) for day in team.days(days_between(first, last))])


@cache
def world() -> World:
    """The processes that `torchrun` started, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    atexit.register(distributed.destroy_process_group)
    return World(distributed.get_rank(), size)


def device() -> torch.device:
    """Where networks are fitted; of several GPUs each process has its own.

    Raises:
        DistributedError: the environment names what is not there.
    """
    name = os.environ.get(DEVICE, "cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise DistributedError(f"{DEVICE} is {name!r}, which is not here: {why}") from None
    return torch.device(name)
