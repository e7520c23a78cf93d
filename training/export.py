"""From a trained A-CTR to a bundle: one graph, checked against torch before it exists."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from bundle.encode import Arrays, Encoder, Request
from bundle.golden import TOLERANCE, Golden, write_golden
from bundle.items import ItemTable
from bundle.manifest import (
    FEATURES,
    GOLDEN,
    ITEM_MODEL,
    ITEMS,
    MODEL,
    PARTS,
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
from bundle.reference import write_reference
from bundle.registry import Registry
from embeddings_store import window_months
from embeddings_store.window import all_absent
from training.actr import load_actr
from training.events import EventLog
from training.examples import Batch, Builder, builder_for, newest_day
from training.gates import Gates
from training.layers import HardMatch
from training.network import Network
from training.recipes import Recipe
from training.requests import RequestMaker
from training.scoring import BundleScorer, Floats, item_run
from training.served import ItemSide, RequestSide
from training.workspace import WindowTable, Workspace

OPSET = 20
_NUM_GOLDEN = 5
_GOLDEN_CANDIDATES = 40
_NUM_REFERENCE = 200
"""Whole requests whose scores say what the bundle's scores look like."""
_CHUNK = 4096
"""Items whose parts are computed at a time."""
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


class Reference(nn.Module):
    """The network as it was trained, with its calibration: what the graphs are checked against."""

    def __init__(self, network: Network, offset: float) -> None:
        super().__init__()
        self.network, self.offset = network, offset
        self.match = HardMatch(network.matched_columns)

    @torch.no_grad()
    def forward(self, x: Batch) -> Tensor:
        """Probabilities float32 [N] of a request's whole history and all columns of its items."""
        x = dict(x)
        history = ("history_item", "history_cat", "history_num")
        x["match"] = self.match(*(x[name] for name in history), x["item_key"], x["item_cat"])
        for name in history:
            x[name] = x[name][:, : self.network.attend]
        logit = (self.network(x) + self.offset).clamp(-60.0, 60.0)
        return 1.0 / (1.0 + torch.exp(-logit))


def export_graph(module: ItemSide | RequestSide, example: Arrays, target: Path) -> None:
    """Writes one of the served graphs to `target`. `example`: inputs of at least 2 candidates,
    since a size of 1 would be taken for a constant."""
    names = module.names()
    inputs = tuple(torch.from_numpy(np.ascontiguousarray(example[name])) for name in names)
    candidates = torch.export.Dim("N", min=1)
    shapes = tuple({0: candidates} if is_per_candidate(name) else {} for name in names)
    with warnings.catch_warnings():
        # The exporter warns of its own internals; what it made is checked by `_parity`.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=names,
            output_names=["score" if isinstance(module, RequestSide) else "part"],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    program.save(str(target), external_data=True)


def is_per_candidate(name: str) -> bool:
    """Whether an input has a row per candidate, and not one for the request."""
    return name.startswith(("item_", "given_", "match"))


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
    reference: Sequence[Request] = (),
) -> str:
    """Exports, checks and publishes a bundle; returns its id.

    requests: real ones, to check torch against the graph and to keep as golden requests. reference:
    whole ones, whose scores are the bundle's reference; the golden ones unless given. gates: what
    they say is kept in the manifest; a bundle that they refuse is published too, but can't be
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
        _export_graphs(export, encoder, requests[0], draft)
        np.save(draft / PARTS, _parts(encoder, log, window, draft / ITEM_MODEL))
        scorer = BundleScorer(encoder, draft)
        parity = _parity(export, encoder, log, window, requests[0], scorer)
        if gates is None and not parity.passed:
            raise ExportError(f"the graph's scores differ from torch's: {parity}")
        inputs = [_windows_of(log, window, request) for request in requests]
        scores = [scorer.score(*each) for each in zip(requests, inputs, strict=True)]
        goldens = [
            Golden(request, one, score)
            for request, one, score in zip(requests, inputs, scores, strict=True)
        ]
        write_golden(draft / GOLDEN, goldens)
        whole = [scorer.score(one, _windows_of(log, window, one)) for one in reference]
        golden_scores = np.concatenate(scores)
        whole_scores = np.concatenate(whole) if whole else golden_scores
        write_reference(draft / REFERENCE, golden_scores, whole_scores)
        manifest = Manifest(
            dataset=log.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            asof=export.asof.isoformat(),
            seed=export.seed,
            window=export.window,
            lineage=export.lineage,
            inputs=graph_inputs(draft / MODEL),
            item_inputs=graph_inputs(draft / ITEM_MODEL),
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


def _export_graphs(export: Export, encoder: Encoder, request: Request, draft: Path) -> None:
    network, places = export.network, np.arange(len(request.item_ids))
    encoded, dim = encoder.request(request), network.window_dim
    user, absent = all_absent(1, dim), all_absent(len(places), dim)
    items: Arrays = {
        **encoder.item_inputs(encoded, places),
        "item_window": absent.vectors,
        "item_window_present": absent.present,
    }
    item_side = ItemSide(network).eval()
    export_graph(item_side, items, draft / ITEM_MODEL)
    with torch.no_grad():
        part = item_side(*(torch.from_numpy(items[name]) for name in item_side.names())).numpy()
    inputs: Arrays = {
        **encoded.inputs,
        "user_window": user.vectors,
        "user_window_present": user.present,
        "item_part": part,
    }
    export_graph(RequestSide(network, encoder.spec, export.offset), inputs, draft / MODEL)


def _parts(encoder: Encoder, log: EventLog, window: WindowTable, model: Path) -> Floats:
    """What the item graph makes of every row of the item table, float32 [n + 1, P]."""
    run, items, found = item_run(model), encoder.items, window.items
    # The item table is sorted by key. Its last row, of what is missing, has no window.
    rows = np.append(np.argsort(log.items.keys), 0)
    chunks = []
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        is_item = np.arange(start, min(start + _CHUNK, len(rows))) < items.missing_row
        inputs: Arrays = {
            "item_cat": items.categorical[part],
            "item_num": items.numeric[part],
            "item_window": found.vectors[rows[part]] * is_item[:, None, None],
            "item_window_present": found.present[rows[part]] & is_item[:, None],
        }
        chunks.append(run(inputs))
    return np.concatenate(chunks)


def _windows_of(log: EventLog, window: WindowTable, request: Request) -> Arrays:
    user = log.users.rows(np.asarray([request.user_id]))
    items = log.items.rows(np.asarray(request.item_ids))
    return {
        "user_window": window.users.vectors[user],
        "user_window_present": window.users.present[user],
        "item_window": window.items.vectors[items],
        "item_window_present": window.items.present[items],
    }


def _parity(
    export: Export,
    encoder: Encoder,
    log: EventLog,
    window: WindowTable,
    request: Request,
    scorer: BundleScorer,
) -> Verdict:
    """Compares what is served with the network in torch at several numbers of candidates, with
    parts from the table and with those that are computed for a request."""
    reference = Reference(export.network, export.offset).eval()
    worst = 0.0
    for size in _SIZES:
        one = resized(request, size)
        windows = _windows_of(log, window, one)
        whole = {**whole_inputs(encoder, one), **windows}
        expected = reference({name: torch.from_numpy(array) for name, array in whole.items()})
        for found in (scorer.score(one, windows), scorer.score(one, windows, from_table=False)):
            difference = float(np.abs(found - expected.numpy()).max())
            # Also where it is not a number.
            worst = difference if not difference <= worst else worst
    sizes = f"at {', '.join(map(str, _SIZES))} candidates"
    return Verdict("parity", worst <= TOLERANCE, worst, f"at most {TOLERANCE:.0e}", sizes)


def resized(request: Request, size: int) -> Request:
    """The same request with `size` of its candidates, in turn."""
    places = [place % len(request.item_ids) for place in range(size)]
    features = {
        name: [column[place] for place in places] for name, column in request.item_features.items()
    }
    ids = [request.item_ids[place] for place in places]
    return replace(request, item_ids=ids, item_features=features)


def whole_inputs(encoder: Encoder, request: Request) -> Arrays:
    """All that `Reference` reads of a request but the windows: the history in its whole length, and
    the columns of its items with what only the request knows in their places."""
    encoded = encoder.request(request)
    items = encoder.item_inputs(encoded, np.arange(len(request.item_ids)))
    for kind, width in (("categorical", 1), ("numeric", 2)):
        name = kind[:3]
        features = encoder.spec.of("item", kind)  # type: ignore[arg-type]
        given = [place for place, feature in enumerate(features) if feature.given]
        columns = [width * place + i for place in given for i in range(width)]
        items[f"item_{name}"][:, columns] = encoded.inputs[f"given_{name}"]
    return {
        **encoded.inputs,
        **items,
        **encoder.whole_history(request),
        "item_key": encoded.item_keys.astype(np.int64),
    }


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
    maker = RequestMaker(log, builder, yesterday)
    requests = [request for request, _ in maker.requests(kept)]
    whole, _ = maker.whole(_NUM_REFERENCE)
    registry = workspace.registry
    return publish_bundle(export, log, builder, window, requests, registry, gates, force, whole)
