"""The smallest real bundle: a feature spec, an item table, a graph that reads every input, golden
requests, sealed and published, with its window in a real store beside it.

The graph is a weighted sum through a sigmoid, so a test can tell one bundle from another by `bias`,
and every way to be bad is one argument or one function here.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import onnxruntime as ort
import uvicorn
from numpy.typing import NDArray
from onnx import TensorProto, helper

from bundle.artifact import open_artifact
from bundle.encode import Arrays, Encoder, Request
from bundle.golden import Golden, write_golden
from bundle.ids import hash_distinct, hash_ids
from bundle.items import ItemTable
from bundle.manifest import Lineage, Manifest, Tensor, Window, seal
from bundle.registry import Registry
from bundle.spec import parse_spec, read_spec
from embeddings_store import (
    Entity,
    PackedWindow,
    RequestWindows,
    Snapshot,
    Store,
    Windows,
    open_store,
    pack_window,
    window_months,
)
from service.app import create_app
from service.scorer import Scores, item_inputs, user_inputs
from service.settings import Settings

DIM = 4
MONTH = "2017-06"
USERS = [f"user-{i}" for i in range(20)]
ITEMS = [f"item-{i}" for i in range(50)]
CATEGORIES = ["books", "games", "food"]

FEATURES = """
[[feature]]
name = "user_id"
entity = "user"
kind = "categorical"
encoding = "hash"
buckets = 100
dim = 4

[[feature]]
name = "age"
entity = "user"
kind = "categorical"
encoding = "vocabulary"
dim = 4

[[feature]]
name = "income"
entity = "user"
kind = "numeric"
encoding = "log"

[[feature]]
name = "hour"
entity = "context"
kind = "categorical"
encoding = "bucketise"
boundaries = [6, 12, 18]
dim = 4

[[feature]]
name = "slot"
entity = "context"
kind = "numeric"
encoding = "linear"

[[feature]]
name = "category"
entity = "item"
kind = "categorical"
encoding = "vocabulary"
dim = 4

[[feature]]
name = "price"
entity = "item"
kind = "numeric"
encoding = "log"

[[feature]]
name = "history"
entity = "user"
kind = "history"
max_length = 5
attend = 3
match = ["category"]
"""

_FLOAT, _INT32, _INT64, _BOOL = (
    TensorProto.FLOAT,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
)
INPUTS: dict[str, tuple[int, list[int | str]]] = {
    "user_cat": (_INT32, [1, 2]),
    "user_num": (_FLOAT, [1, 2]),
    "context_cat": (_INT32, [1, 1]),
    "context_num": (_FLOAT, [1, 2]),
    "history_item": (_INT64, [1, 3]),
    "history_cat": (_INT32, [1, 3, 1]),
    "history_num": (_FLOAT, [1, 3, 2]),
    "match": (_FLOAT, ["N", 14]),
    "user_window": (_FLOAT, [1, 3, DIM + 1]),
    "user_window_present": (_BOOL, [1, 3]),
    "item_part": (_FLOAT, ["N", 2]),
}
ITEM_INPUTS: dict[str, tuple[int, list[int | str]]] = {
    "item_cat": (_INT32, ["N", 1]),
    "item_num": (_FLOAT, ["N", 2]),
    "item_window": (_FLOAT, ["N", 3, DIM + 1]),
    "item_window_present": (_BOOL, ["N", 3]),
}
_DTYPES = {_FLOAT: "float32", _INT32: "int32", _INT64: "int64", _BOOL: "bool"}

ChangeGraph = Callable[[onnx.GraphProto], None]
Spoil = Callable[[Path], object]
"""Changes a draft before it is sealed: its checksums are right, and something else is not."""


@dataclass(frozen=True)
class Place:
    """A registry and an embedded store with one window in it."""

    registry: Registry
    store: Store
    store_url: str
    window: PackedWindow


def make_place(root: Path, store_url: str = "") -> Place:
    """An empty registry and a store with a window, an embedded one unless a URL is given."""
    registry = Registry(root / "registry")
    registry.root.mkdir(parents=True)
    store_url = store_url or str(root / "store")
    store = open_store(store_url)
    window = make_window()
    store.publish(window)
    return Place(registry, store, store_url, window)


def make_window(seed: int = 0, month: str = MONTH, dim: int = DIM) -> PackedWindow:
    """Three months in which most users and items have a vector."""
    rng = np.random.default_rng(seed)

    def snapshot(of: str, ids: Sequence[str]) -> Snapshot:
        known = np.sort(hash_distinct([i for i in ids if rng.random() < 0.8] or ids[:1]))
        vectors = rng.normal(size=(len(known), dim)).astype(np.float32)
        return Snapshot(of, known, vectors, rng.normal(size=len(known)).astype(np.float32))

    months = {
        m: {"users": snapshot(m, USERS), "items": snapshot(m, ITEMS)} for m in window_months(month)
    }
    return pack_window(month, months)  # type: ignore[arg-type]


def add_bundle(
    place: Place,
    *,
    bias: float = 0.0,
    asof: str = "2017-07-01",
    change_graph: ChangeGraph | None = None,
    spoil: Spoil | None = None,
    window: PackedWindow | None = None,
    golden_offset: float = 0.0,
) -> str:
    """Publishes a bundle and returns its id; it is not promoted.

    `change_graph` comes before the golden scores are taken, `spoil` after.
    """
    with place.registry.draft() as draft:
        (draft / "features.toml").write_text(FEATURES)
        vocabulary = {"age": ["18-24", "25-34"], "category": CATEGORIES}
        (draft / "vocabulary.json").write_text(json.dumps(vocabulary))
        (draft / "reference.json").write_text("{}")
        items = _items()
        items.write(draft / "items")
        encoder = Encoder(read_spec(draft / "features.toml"), vocabulary, items)
        write_graph(draft / "actr.onnx", bias)
        write_item_graph(draft / "items.onnx")
        if change_graph is not None:
            edit_graph(draft, change_graph)
        window = window or place.window
        np.save(draft / "items" / "part.npy", _parts(draft, items, window))
        goldens = _goldens(draft, encoder, window, golden_offset)
        write_golden(draft / "golden.json", goldens)
        if spoil is not None:
            spoil(draft)
        seal(draft, _manifest(asof, window))
        return place.registry.publish(draft)


def add_live_bundle(place: Place, *, bias: float = 0.0, window: PackedWindow | None = None) -> str:
    """Publishes a good bundle and promotes it."""
    bundle_id = add_bundle(place, bias=bias, window=window)
    place.registry.promote(bundle_id)
    return bundle_id


def point_at(place: Place, bundle_id: str) -> None:
    """Makes a bundle current without the checks that `Registry.promote` makes."""
    current = {"current": bundle_id, "previous": None, "changed_at": str(time.time_ns())}
    temporary = place.registry.root / "temporary.json"
    temporary.write_text(json.dumps(current))
    temporary.replace(place.registry.root / "current.json")


def settings_of(place: Place, **changes: Any) -> Settings:
    """Settings for a service over `place` that notices a promotion at once."""
    settings = Settings(registry=str(place.registry.root), store=place.store_url, poll_s=0.02)
    return replace(settings, **changes)


@contextmanager
def serving(settings: Settings, store: Store | None = None) -> Iterator[httpx.Client]:
    """The application on a real socket, run by a real server in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(settings, store), lifespan="on", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=20) as client:
            eventually(lambda: server.started or not thread.is_alive())
            yield client
    finally:
        server.should_exit = True
        thread.join()


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Waits until `condition` holds."""
    give_up_at_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at_s, f"did not happen within {timeout_s} s"
        time.sleep(0.01)


def body(num: int = 3, **changes: Any) -> dict[str, Any]:
    """A request that the tiny feature spec takes, with the first `num` items."""
    return {
        "user": {
            "id": "user-3",
            "features": {"age": "18-24", "income": 1200},
            "history": {"items": ["item-1", "item-9"], "age_days": [1, 4.5], "count": [2, 1]},
        },
        "context": {"hour": 13, "slot": 2},
        "candidates": {"id": ITEMS[:num]},
        **changes,
    }


def edit_graph(folder: Path, change: ChangeGraph) -> None:
    model = onnx.load(folder / "actr.onnx", load_external_data=False)
    change(model.graph)
    (folder / "actr.onnx").write_bytes(model.SerializeToString())


def constant(graph: onnx.GraphProto) -> None:
    """Makes all scores equal, as a feature column that was lost would."""
    last = graph.node[-1]
    scaled = helper.make_node("Mul", [last.input[0], "zero"], ["scaled"])
    last.input[0] = "scaled"
    graph.node.insert(len(graph.node) - 1, scaled)


def nan_below_minus_one(graph: onnx.GraphProto) -> None:
    """Makes all scores NaN where the context's numbers sum to less than -1, which no golden has."""
    last = graph.node[-1]
    extra = [
        helper.make_node("Add", ["context_num_sum", "one"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["root"]),
        helper.make_node("Add", [last.input[0], "root"], ["with_root"]),
    ]
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "one"))
    last.input[0] = "with_root"
    for node in extra:
        graph.node.insert(len(graph.node) - 1, node)


def rename_input(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.input[:] = ["user_kat" if name == "user_cat" else name for name in node.input]
    next(node for node in graph.input if node.name == "user_cat").name = "user_kat"


def widen_input(graph: onnx.GraphProto) -> None:
    """Makes an int32 input int64, as an exporter that forgets a cast does."""
    user_cat = next(node for node in graph.input if node.name == "user_cat")
    user_cat.type.tensor_type.elem_type = _INT64


def reach_outside(location: str) -> ChangeGraph:
    """Takes the weights from a file elsewhere."""

    def change(graph: onnx.GraphProto) -> None:
        weights = next(tensor for tensor in graph.initializer if tensor.name == "weights")
        entry = next(entry for entry in weights.external_data if entry.key == "location")
        entry.value = location

    return change


class _Graph:
    """Nodes of a graph whose inputs are added up, with one weight in an external file."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []

    def add(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def summed(self, name: str, axes: str, scale: str) -> str:
        """The sum of an input over all axes but the first, times a constant: [1] or [N]."""
        number = self.add("Cast", [name], f"{name}_float", to=_FLOAT)
        total = self.add("ReduceSum", [number, axes], f"{name}_sum", keepdims=0)
        return self.add("Mul", [total, scale], f"{name}_part")

    def window(self, side: str) -> str:
        """The mean of the months that are there, times the weights: [1] or [N]."""
        mask = self.add("Unsqueeze", [f"{side}_window_present", "last"], f"{side}_mask")
        clean = self.add("Where", [mask, f"{side}_window", "zero"], f"{side}_clean")
        mean = self.add("ReduceSum", [clean, "axis_1"], f"{side}_mean", keepdims=0)
        product = self.add("MatMul", [mean, "weights"], f"{side}_product")
        return self.add("Squeeze", [product, "last"], f"{side}_window_part")

    def total(self, start: str, parts: list[str]) -> str:
        for i, part in enumerate(parts):
            start = self.add("Add", [start, part], f"total_{i}")
        return start

    def write(
        self,
        path: Path,
        inputs: dict[str, tuple[int, list[int | str]]],
        output: tuple[str, list[int | str]],
        bias: float,
    ) -> None:
        constants: dict[str, NDArray[np.generic]] = {
            "axis_1": np.array([1], np.int64),
            "axes_12": np.array([1, 2], np.int64),
            "last": np.array([-1], np.int64),
            "first": np.array([0], np.int64),
            "zero": np.zeros(1, np.float32),
            "zero_int": np.zeros(1, np.int64),
            "small": np.full(1, 0.01, np.float32),
            "medium": np.full(1, 0.1, np.float32),
            "bias": np.full(1, bias, np.float32),
        }
        used = {name for node in self.nodes for name in node.input} | {"zero"}
        initializers = [
            onnx.numpy_helper.from_array(value, name)
            for name, value in constants.items()
            if name in used
        ]
        weights = np.linspace(-0.5, 0.5, DIM + 1, dtype=np.float32).reshape(DIM + 1, 1)
        initializers.append(_external("weights", weights, path.with_suffix(".onnx.data")))
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(output[0], _FLOAT, output[1])],
            initializers,
        )
        version = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=version, ir_version=10)
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(path)


def write_graph(path: Path, bias: float) -> None:
    """score = sigmoid(bias + what each input adds)."""
    graph = _Graph()
    seen = graph.add("Greater", ["history_item", "zero_int"], "history_seen")
    seen = graph.add("Cast", [seen], "history_seen_float", to=_FLOAT)
    seen = graph.add("Unsqueeze", [seen, "last"], "history_mask")
    graph.add("Mul", ["history_num", seen], "history_used")
    parts = [
        graph.summed("user_cat", "axis_1", "small"),
        graph.summed("user_num", "axis_1", "medium"),
        graph.summed("context_cat", "axis_1", "medium"),
        graph.summed("context_num", "axis_1", "medium"),
        graph.summed("history_used", "axes_12", "small"),
        graph.summed("history_cat", "axes_12", "medium"),
        graph.summed("match", "axis_1", "small"),
        graph.window("user"),
        graph.add("Gather", ["item_part", "first"], "first_column", axis=1),
    ]
    parts[-1] = graph.add("Squeeze", [parts[-1], "last"], "of_item")
    graph.add("Sigmoid", [graph.total("bias", parts)], "score")
    graph.write(path, INPUTS, ("score", ["N"]), bias)


def write_item_graph(path: Path) -> None:
    """part = what each input adds, and whether there is a window."""
    graph = _Graph()
    parts = [
        graph.summed("item_cat", "axis_1", "medium"),
        graph.summed("item_num", "axis_1", "medium"),
        graph.window("item"),
    ]
    own = graph.add("Unsqueeze", [graph.total("bias", parts), "last"], "own")
    marks = graph.add("Cast", ["item_window_present"], "marks", to=_FLOAT)
    known = graph.add("ReduceMax", [marks, "axis_1"], "known", keepdims=1)
    graph.add("Concat", [own, known], "part", axis=1)
    graph.write(path, ITEM_INPUTS, ("part", ["N", 2]), 0.0)


def _external(name: str, values: NDArray[np.float32], path: Path) -> TensorProto:
    path.write_bytes(values.tobytes())
    tensor = TensorProto(
        name=name, data_type=_FLOAT, dims=values.shape, data_location=TensorProto.EXTERNAL
    )
    entries = {"location": path.name, "offset": "0", "length": str(values.nbytes)}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def run_by_hand(folder: Path, request: Request, windows: RequestWindows) -> Scores:
    """float32 [N] straight from onnxruntime, without the service: what is known of items comes from
    the bundle, and `windows` are those of the user and of items that it does not know."""
    artifact = open_artifact(folder)
    encoded = artifact.encoder.request(request)
    items = artifact.encoder.item_inputs(encoded, np.arange(len(request.item_ids)))
    session = plain_session(folder / "items.onnx")
    part = session.run(["part"], {**items, **item_inputs(windows.items)})[0]
    own_values = encoded.item_cat is not None or encoded.item_num is not None
    for place, row in enumerate(encoded.item_rows.tolist()):
        if row < len(ITEMS) and not own_values:
            part[place] = np.load(folder / "items" / "part.npy")[row]
    inputs = {**encoded.inputs, **user_inputs(windows.user), "item_part": part}
    feed = {name: inputs[name] for name in INPUTS}
    scores: Scores = plain_session(folder / "actr.onnx").run(["score"], feed)[0]
    return scores


def windows_of(window: PackedWindow, entity: Entity, ids: Sequence[str]) -> Windows:
    """What is in a window of some ids, by hand."""
    table = window.tables[entity]
    vectors = np.zeros((len(ids), 3, DIM + 1), np.float32)
    present = np.zeros((len(ids), 3), np.bool_)
    for place, key in enumerate(hash_ids(ids)):
        (row,) = np.flatnonzero(table.ids == key)[:1].tolist() or [-1]
        if row >= 0:
            vectors[place] = table.block[row]
            present[place] = [bool(table.bits[row] >> month & 1) for month in range(3)]
    return Windows(vectors, present)


def plain_session(path: Path) -> ort.InferenceSession:
    """One without the service's options: flushing denormals would stick to the test's thread."""
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _items() -> ItemTable:
    spec = parse_spec(tomllib.loads(FEATURES))
    encoder = Encoder(spec, {"category": CATEGORIES}, _no_items())
    categories = [CATEGORIES[i % 3] for i in range(len(ITEMS))]
    prices = [float(i) for i in range(len(ITEMS))]
    return ItemTable.build(
        hash_distinct(ITEMS),
        encoder.categorical(spec["category"], categories, "category")[:, None],
        encoder.numeric(spec["price"], prices, "price"),
    )


def _no_items() -> ItemTable:
    empty = np.zeros(0, np.uint64)
    return ItemTable.build(empty, np.zeros((0, 1), np.int32), np.zeros((0, 2), np.float32))


def _parts(draft: Path, items: ItemTable, window: PackedWindow) -> NDArray[np.float32]:
    names = {int(key): name for key, name in zip(hash_ids(ITEMS), ITEMS, strict=True)}
    found = windows_of(window, "items", [*(names[int(key)] for key in items.keys), "nothing"])
    feed = {"item_cat": items.categorical, "item_num": items.numeric, **item_inputs(found)}
    parts: NDArray[np.float32] = plain_session(draft / "items.onnx").run(["part"], feed)[0]
    return parts


def _goldens(draft: Path, encoder: Encoder, window: PackedWindow, offset: float) -> list[Golden]:
    session, items_session = (plain_session(draft / f"{n}.onnx") for n in ("actr", "items"))
    goldens = []
    for user, items in (("user-1", ITEMS[:5]), ("nobody", ["item-7", "nothing"])):
        request = Request(user, items, {"age": "25-34"}, {"hour": 9}, {}, ["item-3"], [2.0], [1.0])
        encoded = encoder.request(request)
        windows: Arrays = {
            "user_window": np.full((1, 3, DIM + 1), 0.25, np.float32),
            "user_window_present": np.ones((1, 3), np.bool_),
            **item_inputs(windows_of(window, "items", items)),
        }
        own = {**encoder.item_inputs(encoded, np.arange(len(items))), **windows}
        feed = {name: own[name] for name in ITEM_INPUTS}
        inputs = {**encoded.inputs, **windows, "item_part": items_session.run(["part"], feed)[0]}
        scores = session.run(["score"], {name: inputs[name] for name in INPUTS})[0]
        goldens.append(Golden(request, windows, scores.astype(np.float64) + offset))
    return goldens


def _manifest(asof: str, window: PackedWindow) -> Manifest:
    ref = window.ref
    lineage = Lineage(
        tpm_months=window_months(ref.window),
        cpm_id="cpm-1",
        cpm_from="2017-06-01",
        cpm_to="2017-06-30",
        actr_from="2017-06-01",
        actr_to="2017-06-30",
    )
    return Manifest(
        dataset="tiny",
        created="2017-07-01T00:00:00+00:00",
        asof=asof,
        seed=0,
        window=Window(ref.window, ref.build, window.dim),
        lineage=lineage,
        inputs=_tensors(INPUTS),
        item_inputs=_tensors(ITEM_INPUTS),
        metrics={"auc": 0.75},
    )


def _tensors(inputs: dict[str, tuple[int, list[int | str]]]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name, _DTYPES[kind], tuple(shape)) for name, (kind, shape) in inputs.items()
    )
