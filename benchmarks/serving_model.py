"""What the servers of `benchmarks.serving` serve: one trained A-CTR as this project's bundle and as
one conventional graph, its windows in one Redis in both layouts, and real requests.

The conventional graph is the whole network, with the history matched inside: once with one user row
(`shared`), and once with every input of the user repeated for each candidate (`tiled`), as graphs
that were trained on rows usually want it.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import redis
import torch
from torch import Tensor, nn

from benchmarks.peers.conventional import GRAPHS, PREFIX, SETUP
from bundle.artifact import open_artifact
from bundle.encode import AGE, COUNT, Arrays, Encoder, Request
from bundle.golden import body_of
from bundle.match import DECAY_DAYS, NEVER_DAYS, RECENT_DAYS
from embeddings_store import Windows, open_store
from embeddings_store.window import all_absent
from training.actr import Actr, load_actr
from training.events import EventLog
from training.examples import builder_for, newest_day
from training.export import OPSET, export_actr, is_per_candidate, resized, whole_inputs
from training.layers import HardMatch
from training.recipes import Recipe
from training.requests import RequestMaker
from training.workspace import WindowTable, Workspace

Body = dict[str, Any]

NAMES = [
    *("user_cat", "user_num", "context_cat", "context_num"),
    *("history_item", "history_cat", "history_num", "item_key", "item_cat", "item_num"),
    *("user_window", "user_window_present", "item_window", "item_window_present"),
]
"""Inputs of the conventional graph."""
_KEYS_AT_A_TIME = 1000


@dataclass(frozen=True)
class Served:
    """folder: what the peers read. workspace: one of its own, with the bundle promoted."""

    folder: Path
    workspace: Workspace
    store: str
    bodies: dict[int, list[Body]]
    """By the number of candidates."""


def make(
    source: Workspace, asof: date, recipe: Recipe, folder: Path, store: str, sizes: dict[int, int]
) -> Served:
    """Exports both forms of the A-CTR of a day, and fills the Redis at `store`. Nothing in `source`
    is changed. sizes: how many bodies of each number of candidates."""
    workspace = _beside(source, folder / "workspace")
    bundle = export_actr(workspace, asof, recipe)
    workspace.registry.promote(bundle)
    log, actr = workspace.log(), load_actr(workspace, asof, recipe.network)
    yesterday = newest_day(log, "ad", asof)
    builder = builder_for(workspace, log, yesterday, asof)
    _fill_store(store, workspace, log, builder.window(asof))
    rows = log.full_lists([yesterday], max(sizes.values()))
    requests = [one for one, _ in RequestMaker(log, builder, yesterday).requests(rows)]
    path, dim = workspace.registry.path(bundle), actr.network.window_dim
    export_graphs(actr, _example(open_artifact(path).encoder, resized(requests[0], 3), dim), folder)
    bodies = {n: [body_of(resized(r, n)) for r in requests[:num]] for n, num in sizes.items()}
    setup = {"bundle": str(path.resolve()), "store": store, "dim": dim}
    examples = [some[0] for some in bodies.values()]
    (folder / SETUP).write_text(json.dumps({**setup, "examples": examples}))
    return Served(folder, workspace, store, bodies)


def _fill_store(store: str, workspace: Workspace, log: EventLog, window: WindowTable) -> None:
    """The window as this project lays it out, and a packed value per entity, as others do."""
    assert window.ref is not None
    opened = open_store(store)
    opened.publish(workspace.pack(window.ref.window))
    opened.close()
    with redis.Redis.from_url(store) as client:
        _fill(client, PREFIX["users"], log.users.ids, window.users)
        _fill(client, PREFIX["items"], log.items.ids, window.items)


def _beside(source: Workspace, root: Path) -> Workspace:
    """A workspace on the data and models of another, with a registry and a store of its own."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name in ("data", "models", "snapshots"):
        (root / name).symlink_to((source.root / name).resolve())
    return Workspace(root)


def _fill(client: redis.Redis, prefix: str, ids: npt.NDArray[Any], found: Windows) -> None:
    """One packed value for each entity that has a month; exact, since windows are float16."""
    flat = found.vectors.reshape(len(ids), -1)
    packed = np.concatenate([found.present, flat], axis=1).astype(np.float16)
    known = np.flatnonzero(found.present.any(1)).tolist()
    for start in range(0, len(known), _KEYS_AT_A_TIME):
        some = known[start : start + _KEYS_AT_A_TIME]
        client.mset({f"{prefix}{ids[row]}": packed[row].tobytes() for row in some})


# The conventional graph


class _Whole(nn.Module):
    """The network with its calibration, and with the history matched inside."""

    def __init__(self, actr: Actr, match: nn.Module) -> None:
        super().__init__()
        self.network, self.offset, self.match = actr.network, actr.offset, match

    def forward(self, *inputs: Tensor) -> Tensor:
        """Probabilities float32 [N] of the inputs, in the order of `NAMES`."""
        x = dict(zip(NAMES, inputs, strict=True))
        history = ("history_item", "history_cat", "history_num")
        x["match"] = self.match(*(x[name] for name in history), x["item_key"], x["item_cat"])
        for name in history:
            x[name] = x[name][:, : self.network.attend]
        logit = (self.network(x) + self.offset).clamp(-60.0, 60.0)
        return 1.0 / (1.0 + torch.exp(-logit))


class TiledMatch(nn.Module):
    """What `HardMatch` does, with a history of its own for each candidate."""

    def __init__(self, columns: list[int]) -> None:
        super().__init__()
        self._columns = columns

    def forward(
        self,
        history_item_BL: Tensor,
        history_cat_BLM: Tensor,
        history_num_BL2: Tensor,
        item_key_B: Tensor,
        item_cat_BF: Tensor,
    ) -> Tensor:
        age_BL, count_BL = (
            history_num_BL2[..., AGE].clamp(max=NEVER_DAYS),
            history_num_BL2[..., COUNT],
        )
        real_BL = (history_item_BL > 0).to(count_BL.dtype)
        decayed_BL, recent_BL = torch.exp(-age_BL / DECAY_DAYS), torch.exp(-age_BL / RECENT_DAYS)
        sums_BL4 = torch.stack([real_BL, count_BL, count_BL * decayed_BL, recent_BL], dim=2)
        levels = [(history_item_BL, item_key_B)]
        levels += [
            (history_cat_BLM[..., m], item_cat_BF[:, column])
            for m, column in enumerate(self._columns)
        ]
        found = [_level(history, item, age_BL, sums_BL4) for history, item in levels]
        totals = torch.log1p((sums_BL4[..., :2] * real_BL[..., None]).sum(1))
        return torch.cat([*found, totals], dim=1)


def _level(history_BL: Tensor, item_B: Tensor, age_BL: Tensor, sums_BL4: Tensor) -> Tensor:
    same_BL = (history_BL == item_B[:, None]) & (history_BL > 0)
    sums_B4 = torch.log1p(torch.bmm(same_BL[:, None].to(sums_BL4.dtype), sums_BL4)[:, 0])
    present = (sums_B4[:, :1] > 0).to(sums_BL4.dtype)
    newest = torch.where(same_BL, age_BL, NEVER_DAYS).amin(1, keepdim=True)
    return torch.cat([present, sums_B4, torch.log1p(newest)], dim=1)


def _example(encoder: Encoder, request: Request, dim: int) -> Arrays:
    """Inputs of a request without windows, its history longer than what is attended to."""
    inputs = whole_inputs(encoder, request)
    steps = encoder.spec.history.attend + 2
    for name in ("history_item", "history_cat", "history_num"):
        inputs[name] = np.resize(inputs[name], (1, steps, *inputs[name].shape[2:]))
    for side, num in (("user", 1), ("item", len(request.item_ids))):
        absent = all_absent(num, dim)
        inputs[f"{side}_window"] = absent.vectors
        inputs[f"{side}_window_present"] = absent.present
    return inputs


def export_graphs(actr: Actr, example: Arrays, folder: Path) -> None:
    """Writes both variants; their scores are compared with the service's before any is timed."""
    columns, num = actr.network.matched_columns, len(example["item_key"])
    _export(_Whole(actr, HardMatch(columns)), example, folder / GRAPHS["shared"], tiled=False)
    tiled = {n: a if is_per_candidate(n) else np.repeat(a, num, axis=0) for n, a in example.items()}
    _export(_Whole(actr, TiledMatch(columns)), tiled, folder / GRAPHS["tiled"], tiled=True)


def _export(module: nn.Module, example: Arrays, target: Path, *, tiled: bool) -> None:
    candidates = torch.export.Dim("N", min=1)
    steps = torch.export.Dim("L", min=example["history_item"].shape[1] - 1)
    shapes: list[dict[int, Any]] = []
    for name in NAMES:
        per_row = {0: candidates} if tiled or is_per_candidate(name) else {}
        shapes.append({**per_row, **({1: steps} if name.startswith("history_") else {})})
    with warnings.catch_warnings():
        # The exporter warns of its own internals.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module.eval(),
            tuple(torch.from_numpy(np.ascontiguousarray(example[name])) for name in NAMES),
            dynamo=True,
            dynamic_shapes=(tuple(shapes),),
            input_names=NAMES,
            output_names=["score"],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    program.save(str(target), external_data=True)
