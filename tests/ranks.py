"""Run by `torchrun` in two processes: trains all tiers on the tiny data set, and writes down what
each process ended with."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn

from training import actr, cpm, tpm
from training.distributed import DistributedError, World, world
from training.tables import Block, Table
from training.workspace import Workspace

ROWS = [[0, 3, 3, 7], [7, 1]]
"""Of a block, by process."""


def digest(model: nn.Module) -> str:
    tensors = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in tensors)).hexdigest()


def watched(found: list[str], run: Callable[..., float]) -> Callable[..., float]:
    """`run`, which ends with the model that is its first argument having been written down."""

    def watching(model: nn.Module, *rest: Any) -> float:
        loss = run(model, *rest)
        found.append(digest(model))
        return loss

    return watching


def block_after_one_step(rows: list[int], team: World) -> Tensor:
    """The weights of a block after a step whose gradient of row r is r + 1 in all columns."""
    table = Table(9, 2)
    torch.nn.init.ones_(table.weight)
    block, row = Block([table], 6), torch.tensor(rows)
    block.keep(row, (row + 1.0)[:, None].expand(-1, 2))
    block.step(0.5, team)
    return block.weight


def refusal(workspace: Workspace) -> str:
    """What happens when one process takes its own gradients for those of all."""
    added = World.add
    if world().rank == 1:
        World.add = lambda self, tensors: added(self, [t.clone() for t in tensors])  # type: ignore[method-assign]
    recipe = tiny.RECIPE
    try:
        cpm.train_cpm(workspace, tiny.ASOF, recipe.network, recipe.cpm, 0, with_tpm=False)
    except DistributedError as error:
        return str(error)
    return "nothing"


def main(root: Path) -> None:
    torch.set_num_threads(1)
    found: list[str] = []
    tpm.train_tpm = watched(found, tpm.train_tpm)
    cpm.fit = actr.fit = watched(found, cpm.fit)  # type: ignore[attr-defined]
    workspace = Workspace(root)
    tiny.train_before_ads(workspace)
    actr.train_actr(workspace, tiny.ASOF, tiny.RECIPE.network, tiny.RECIPE.actr, seed=0)
    rank = world().rank
    said = {
        "models": found,
        "block": block_after_one_step(ROWS[rank], world()).tolist(),
        "apart": refusal(workspace),
    }
    (root.parent / f"rank-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
