"""From a trained A-CTR to a bundle: one graph, checked against torch before it exists."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from bundle.encode import Arrays, Encoder, Request
from bundle.golden import TOLERANCE, Golden, write_golden
from bundle.items import ItemTable
from bundle.manifest import (
    FEATURES,
    GOLDEN,
    ITEMS,
    MODEL,
    REFERENCE,
    VOCABULARY,
    Lineage,
    Manifest,
    Verdict,
    Window,
    seal,
)
from bundle.manifest import (
    Tensor as InputTensor,
)
from bundle.registry import Registry
from embeddings_store import window_months
from training.actr import load_actr
from training.events import EventLog
from training.examples import Builder, builder_for, newest_day
from training.gates import Gates
from training.layers import HardMatch
from training.network import Network
from training.recipes import Recipe
from training.requests import RequestMaker
from training.scoring import open_session, run_session
from training.workspace import WindowTable, Workspace

OPSET = 20
_NUM_GOLDEN = 5
_GOLDEN_CANDIDATES = 40
_SIZES = (1, 2, 7, 500)
"""Numbers of candidates at which the exported graph is checked."""


class ExportError(ValueError):
    """The exported graph does not do what the network does; nothing was published."""


@dataclass(frozen=True)
class Export:
    """What a bundle is made from, besides the data set."""

    network: Network
    offset: float
    """Added to the logit: the calibration on the most recent days."""
    correction: float
    """What of it comes from the day that the gates judge by."""
    asof: date
    window: Window
    lineage: Lineage
    seed: int
    metrics: dict[str, float]


class Served(nn.Module):
    """The graph that is served: the network, its calibration, and a probability at the end."""

    def __init__(self, network: Network, offset: float) -> None:
        super().__init__()
        self.network = network
        self.match = HardMatch(network.matched_columns)
        self.register_buffer("offset", torch.tensor(offset, dtype=torch.float32))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Probabilities float32 [N] of the inputs, in the order of `input_names`."""
        x = dict(zip(input_names(self.network), inputs, strict=True))
        history = ("history_item", "history_cat", "history_num")
        x["match"] = self.match(*(x[name] for name in history), x["item_key"], x["item_cat"])
        for name in history:
            x[name] = _newest(x[name], self.network.attend)
        logit = (self.network(x) + self.offset).clamp(-60.0, 60.0)
        # Spelled out: onnxruntime's Sigmoid is exact to 1e-7 only, which makes most ads equal.
        return 1.0 / (1.0 + torch.exp(-logit))


def _newest(history_1L: Tensor, length: int) -> Tensor:
    """The first `length` steps; padded first, since the history may be shorter."""
    padding = torch.zeros((1, length, *history_1L.shape[2:]), dtype=history_1L.dtype)
    return torch.cat([history_1L, padding], dim=1)[:, :length]


def input_names(network: Network) -> list[str]:
    """Names of the graph's inputs, in order: what has no columns or is not used is not there."""
    names = [
        "user_cat",
        "user_num",
        "context_cat",
        "context_num",
        "history_item",
        "history_cat",
        "history_num",
        "item_key",
        "item_cat",
        "item_num",
    ]
    windows = ["user_window", "user_window_present", "item_window", "item_window_present"]
    return names + windows if network.window_dim else names


def export_graph(network: Network, offset: float, example: Arrays, target: Path) -> None:
    """Writes the served graph to `target`. `example`: inputs of one request of at least 2
    candidates, since a size of 1 would be taken for a constant."""
    served = Served(network, offset).eval()
    names = input_names(network)
    inputs = tuple(torch.from_numpy(np.ascontiguousarray(example[name])) for name in names)
    candidates = torch.export.Dim("N", min=1)
    steps = torch.export.Dim("L", min=1)
    shapes = tuple(
        {0: candidates} if name.startswith("item_") else {1: steps} if "history" in name else {}
        for name in names
    )
    with warnings.catch_warnings():
        # The exporter warns of its own internals; what it made is checked by `_check`.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            served,
            inputs,
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=names,
            output_names=["score"],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    program.save(str(target), external_data=True)


def graph_inputs(model: Path) -> tuple[InputTensor, ...]:
    """The inputs of a graph file, as the manifest lists them."""
    graph = onnx.load(str(model), load_external_data=False).graph
    found = []
    for value in graph.input:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        found.append(InputTensor(value.name, dtype, shape))
    return tuple(found)


def publish_bundle(
    export: Export,
    log: EventLog,
    builder: Builder,
    window: WindowTable,
    requests: Sequence[Request],
    registry: Registry,
    gates: Gates | None = None,
    force: bool = False,
) -> str:
    """Exports, checks and publishes a bundle; returns its id.

    requests: real ones, to check torch against the graph and to keep as golden requests. gates:
    what they say is kept in the manifest; a bundle that they refuse is published too, but can't be
    promoted unless it is made with `force`.

    Raises:
        ExportError: no gates were given, and scores of the graph differ from torch's by more than
            the tolerance.
    """
    with registry.draft() as draft:
        shutil.copy(log.root / FEATURES, draft / FEATURES)
        shutil.copy(log.root / VOCABULARY, draft / VOCABULARY)
        items = item_table(log, builder, export.asof)
        items.write(draft / ITEMS)
        encoder = Encoder(log.spec, log.vocabulary, items)
        inputs = [_inputs(encoder, log, window, request) for request in requests]
        export_graph(export.network, export.offset, inputs[0], draft / MODEL)
        parity = _parity(export, inputs, draft / MODEL)
        if gates is None and not parity.passed:
            raise ExportError(f"the graph's scores differ from torch's: {parity}")
        session = open_session(draft / MODEL)
        scores = [run_session(session, one) for one in inputs]
        goldens = [
            Golden(request, _windows_only(one), score)
            for request, one, score in zip(requests, inputs, scores, strict=True)
        ]
        write_golden(draft / GOLDEN, goldens)
        _write_reference(draft / REFERENCE, np.concatenate(scores))
        manifest = Manifest(
            dataset=log.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            asof=export.asof.isoformat(),
            seed=export.seed,
            window=export.window,
            lineage=export.lineage,
            inputs=graph_inputs(draft / MODEL),
            metrics=export.metrics,
            forced=force,
        )
        if gates:
            judged = gates.judge(draft, manifest, export.correction)
            verdicts = (parity, *judged.verdicts)
            manifest = replace(manifest, gates=verdicts, metrics=judged.metrics)
        seal(draft, manifest)
        return registry.publish(draft)


def item_table(log: EventLog, builder: Builder, day: date) -> ItemTable:
    """All items' encoded features as they stand before `day`."""
    return ItemTable.build(log.items.keys, log.items.categorical, builder.item_numbers(day))


def _inputs(encoder: Encoder, log: EventLog, window: WindowTable, request: Request) -> Arrays:
    user = log.users.rows(np.asarray([request.user_id]))
    items = log.items.rows(np.asarray(request.item_ids))
    return {
        **encoder.request(request).inputs,
        "user_window": window.users.vectors[user],
        "user_window_present": window.users.present[user],
        "item_window": window.items.vectors[items],
        "item_window_present": window.items.present[items],
    }


def _parity(export: Export, inputs: Sequence[Arrays], model: Path) -> Verdict:
    """Compares the graph with torch at several sizes."""
    session = open_session(model)
    served = Served(export.network, export.offset).eval()
    names = input_names(export.network)
    worst = 0.0
    for size in _SIZES:
        one = {name: _resized(name, array, size) for name, array in inputs[0].items()}
        with torch.no_grad():
            expected = served(*(torch.from_numpy(one[name]) for name in names)).numpy()
        difference = float(np.abs(run_session(session, one) - expected).max())
        # Also where it is not a number.
        worst = difference if not difference <= worst else worst
    sizes = f"at {', '.join(map(str, _SIZES))} candidates"
    return Verdict("parity", worst <= TOLERANCE, worst, f"at most {TOLERANCE:.0e}", sizes)


def _resized(name: str, array: npt.NDArray[np.generic], size: int) -> npt.NDArray[np.generic]:
    if not name.startswith("item_"):
        return array
    return np.resize(array, (size, *array.shape[1:]))


def _windows_only(inputs: Arrays) -> Arrays:
    return {name: array for name, array in inputs.items() if "_window" in name}


def _write_reference(path: Path, scores: npt.NDArray[np.float64]) -> None:
    """The distribution of scores on the golden requests: its 0 .. 100 % quantiles."""
    quantiles = np.quantile(scores, np.linspace(0, 1, 21))
    path.write_text(json.dumps({"quantiles": quantiles.tolist(), "count": len(scores)}))


def export_actr(
    workspace: Workspace,
    asof: date,
    recipe: Recipe,
    gates: Gates | None = None,
    force: bool = False,
) -> str:
    """Exports the full A-CTR of a day and returns the bundle's id; see `publish_bundle`. Its golden
    requests are those of the day before: of the day itself there are none yet."""
    log = workspace.log()
    actr = load_actr(workspace, asof, recipe.network)
    yesterday = newest_day(log, "ad", asof)
    builder = builder_for(workspace, log, yesterday, asof)
    window = builder.window(asof)
    assert window.ref is not None
    month = window.ref.window
    cpm = actr.facts["cpm"]
    export = Export(
        network=actr.network,
        offset=actr.offset,
        correction=actr.correction,
        asof=asof,
        window=Window(month, window.ref.build, actr.network.window_dim),
        lineage=Lineage(
            tpm_months=window_months(month),
            cpm_id=cpm["name"],
            cpm_from=cpm["from"],
            cpm_to=cpm["to"],
            actr_from=actr.facts["from"],
            actr_to=actr.facts["to"],
        ),
        seed=actr.facts["seed"],
        metrics=workspace.metrics(asof),
    )
    rows = log.full_lists([yesterday], _NUM_GOLDEN)
    kept = rows.group_by("request_id", maintain_order=True).head(_GOLDEN_CANDIDATES)
    requests = [request for request, _ in RequestMaker(log, builder, yesterday).requests(kept)]
    registry = workspace.registry
    return publish_bundle(export, log, builder, window, requests, registry, gates, force)
