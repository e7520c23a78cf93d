"""How fast the training loop is, beside two libraries for the same job.

All sides train the same network on the same rows for one pass, in processes of their own that take
turns: embeddings of all fields, then an MLP. Rows are made up: ids by a power law, clicks from a
known model, so that the best possible log loss is known too. What is ours is `training.fit.fit` on
layers of `training.layers`, as CPM and A-CTR use them, and it reads its rows from Parquet while it
trains; the others have theirs in memory before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import torch._dynamo  # an optimiser's first step imports it, for seconds; so do all sides before
from scipy.special import expit
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn

from benchmarks.figures import Figures
from bundle.encode import Encoder
from bundle.items import ItemTable
from bundle.spec import Feature, read_spec
from embeddings_store.window import all_absent
from training.config import FitConfig, NetworkConfig, TpmConfig
from training.datasets.complete_journey import import_complete_journey, source_folder
from training.events import EventLog
from training.examples import Batch, Builder, Examples, Sides
from training.fit import fit, predict
from training.layers import FieldEmbeddings
from training.network import Network
from training.parts import Parts
from training.tpm import Tpm, train_tpm

Floats = npt.NDArray[np.float64]

PEERS = ("deepctr_torch", "fuxictr")
RATES = (1e-3, 3e-3, 3e-4)
"""Of the dense parameters, and with the peers of the tables too; one a round, and each side may
choose. The first is what both peers have by default."""
GOAL = 5.0
"""Times the rows per second of the faster peer."""
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Size:
    """Of the network, the data and the run."""

    fields: int = 20
    vocabulary: int = 100_000
    dim: int = 16
    hidden: tuple[int, ...] = (256, 128, 64)
    batch_size: int = 4096
    threads: int = 2
    parts: int = 10
    part_rows: int = 100_000
    test_rows: int = 200_000

    def arguments(self) -> list[str]:
        """As the peers' scripts take them."""
        sizes = (self.threads, self.fields, self.vocabulary, self.dim, *self.hidden)
        return [str(number) for number in (*sizes, self.batch_size)]


QUICK = Size(fields=4, vocabulary=20_000, dim=4, hidden=(16, 8, 8), parts=2, part_rows=20_000)
QUICK = replace(QUICK, batch_size=512, test_rows=10_000)


class Truth:
    """The model that clicks are drawn from: a weight per id, and products between fields."""

    def __init__(self, size: Size, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._size = size
        shape = (size.fields, size.vocabulary)
        self._weight = rng.normal(0.0, 1.2 / np.sqrt(size.fields), shape)
        self._factors = rng.normal(0.0, 1.0, (*shape, 2))

    def draw(self, num: int, rng: np.random.Generator) -> tuple[pl.DataFrame, Floats]:
        """Rows with columns f0, f1, ... (ids from 1 on) and label, and their real rates."""
        size, logit = self._size, np.full(num, -1.5)
        columns: dict[str, npt.NDArray[Any]] = {}
        last = np.zeros((num, 2))
        for i in range(size.fields):
            # The n-th id is as likely as 1 / n.
            ids = ((size.vocabulary - 1) ** rng.random(num)).astype(np.int32)
            columns[f"f{i}"] = ids
            logit += self._weight[i, ids]
            own = self._factors[i, ids]
            logit += (own * last).sum(1) * (0.8 / np.sqrt(2 * size.fields))
            last = own
        rate = expit(logit)
        columns["label"] = (rng.random(num) < rate).astype(np.int8)
        return pl.DataFrame(columns), rate


def write_rows(folder: Path, size: Size) -> float:
    """Writes train/ and test/ of Parquet parts; the best log loss that is possible on the test."""
    truth, rng = Truth(size), np.random.default_rng(1)
    for name in ("train", "test"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for part in range(size.parts):
        rows, _ = truth.draw(size.part_rows, rng)
        rows.write_parquet(folder / "train" / f"part-{part:03d}.parquet")
    rows, rate = truth.draw(size.test_rows, rng)
    rows.write_parquet(folder / "test" / "part-000.parquet")
    return float(log_loss(rows["label"].to_numpy(), rate))


def read_part(path: Path) -> Examples:
    """A Parquet file of rows as examples that have an item's categorical features only."""
    rows = pl.read_parquet(path)
    label = rows["label"].to_numpy().astype(np.float32)
    num, cat = len(rows), rows.drop("label").to_numpy().astype(np.int32)
    none = np.zeros((num, 0), np.float32)
    one = np.zeros(num, np.int64)
    absent = all_absent(1, 0)
    sides = Sides(
        user_cat=np.zeros((1, 0), np.int32),
        user_num=none[:1],
        history_item=np.zeros((1, 0), np.int64),
        history_cat=np.zeros((1, 0, 0), np.int32),
        history_num=np.zeros((1, 0, 2), np.float32),
        user_window=absent.vectors,
        user_window_present=absent.present,
    )
    return Examples(
        sides=sides,
        item_windows=absent,
        side=one,
        item_window_row=one,
        item_key=one,
        item_cat=cat,
        item_num=none,
        match=none,
        context_cat=np.zeros((num, 0), np.int32),
        context_num=none,
        label=label,
        weight=np.ones(num, np.float32),
        user_row=one,
        request_id=np.arange(num),
        day=np.zeros(num, "datetime64[D]"),
    )


class Dnn(nn.Module):
    """The network that all sides train."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tables = nn.ModuleDict()
        names = [f"f{i}" for i in range(size.fields)]
        features = [
            Feature(n, "item", "categorical", "hash", size.dim, size.vocabulary, table=n)
            for n in names
        ]
        self.fields = FieldEmbeddings(features, _encoder(), self.tables)
        layers: list[nn.Module] = []
        width = self.fields.width
        for units in size.hidden:
            layers += [nn.Linear(width, units), nn.ReLU()]
            width = units
        self.mlp, self.logit = nn.Sequential(*layers), nn.Linear(width, 1)
        self.apply(_start)

    def forward(self, x: Batch) -> Tensor:
        """Logits float32 [B]."""
        logit: Tensor = self.logit(self.mlp(self.fields(x["item_cat"])))
        return logit[:, 0]

    def fit_statistics(self, x: Batch) -> None:
        """There are no numbers."""


def _start(part: nn.Module) -> None:
    """As FuxiCTR starts its MLP, which matters here more than the optimiser does."""
    if isinstance(part, nn.Linear):
        nn.init.xavier_normal_(part.weight)
        nn.init.zeros_(part.bias)


def run_ours(data: Path, out: Path, rate: float, size: Size) -> dict[str, float]:
    """Trains on `data`/train, and keeps the logits of `data`/test in `out`."""
    torch.set_num_threads(size.threads)
    torch.manual_seed(0)
    network = cast(Network, Dnn(size))
    parts = Parts([partial(read_part, path) for path in sorted((data / "train").iterdir())])
    config = FitConfig(batch_size=size.batch_size, learning_rate=rate)
    start = time.perf_counter()
    fit(network, parts, config, seed=0, name="ours")
    seconds = time.perf_counter() - start
    test = read_part(data / "test" / "part-000.parquet")
    np.save(out, expit(predict(network, test)))
    return {"seconds": seconds, "rows": size.parts * size.part_rows}


@dataclass(frozen=True)
class Run:
    """What one side did in one round."""

    side: str
    rate: float
    rows_per_s: float
    log_loss: float
    auc: float
    pcoc: float
    """Predicted clicks per real one."""


def take_turns(folder: Path, size: Size, peers: Sequence[str]) -> list[Run]:
    """Each round every side once, in processes of their own, one at a time."""
    label = pl.read_parquet(folder / "test")["label"].to_numpy()
    runs = []
    for rate in RATES[: len(RATES) if peers else 1]:
        for side in ("ours", *peers):
            out = folder / f"{side}.npy"
            said = _process(side, folder, out, rate, size)
            score = np.clip(np.load(out).astype(np.float64), 1e-7, 1 - 1e-7)
            runs.append(
                Run(
                    side,
                    rate,
                    said["rows"] / said["seconds"],
                    float(log_loss(label, score)),
                    float(roc_auc_score(label, score)),
                    float(score.sum() / label.sum()),
                )
            )
            print(json.dumps(runs[-1].__dict__), file=sys.stderr)
    return runs


def _process(side: str, folder: Path, out: Path, rate: float, size: Size) -> dict[str, float]:
    environ = {**os.environ, "OMP_NUM_THREADS": str(size.threads), "PYTHONPATH": str(ROOT)}
    if side == "ours":
        command = [
            sys.executable,
            "-m",
            "benchmarks.training",
            "--side",
            str(folder),
            str(out),
            str(rate),
        ]
        command += ["--quick"] if size == QUICK else []
    else:
        python = ROOT / "build" / "bench" / "peers" / side / "bin" / "python"
        script = ROOT / "benchmarks" / "peers" / f"{side}.py"
        command = [str(python), str(script), str(folder), str(out), str(rate), *size.arguments()]
        del environ["PYTHONPATH"]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr.strip().splitlines()[-1]}")
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return said


def tier_speeds(data: Path) -> dict[str, float]:
    """Rows per second of our own tiers, one thread each, on Complete Journey: TPM on half a month,
    A-CTR on six days, apart for building rows and for fitting on them."""
    torch.set_num_threads(1)
    log = EventLog(data)
    first, last = date(2017, 10, 1), date(2017, 10, 15)
    config = TpmConfig(passes=1)
    torch.manual_seed(0)
    start = time.perf_counter()
    train_tpm(Tpm(log, config), log, first, last, seed=0)
    tpm_s = time.perf_counter() - start
    positives = int((log.rows("natural", first, last)["label"] == 1).sum())
    tpm_rows = positives * (1 + config.store_negatives + config.catalogue_negatives)

    first, last = date(2017, 10, 10), date(2017, 10, 15)
    # Windows are absent, and cost what they cost otherwise.
    builder = Builder(log, {}, date(2017, 10, 16), window_dim=config.dim)
    start = time.perf_counter()
    examples = builder.days("ad", first, last)
    build_s = time.perf_counter() - start
    network = Network(log.spec, log.encoder, NetworkConfig(), config.dim)
    start = time.perf_counter()
    fit(network, examples, FitConfig(passes=2, ranking=0.3), seed=0, name="actr")
    fit_s = time.perf_counter() - start
    return {
        "tpm": tpm_rows / tpm_s,
        "actr build": len(examples) / build_s,
        "actr fit": 2 * len(examples) / fit_s,
    }


def figures(runs: list[Run], best: float, tiers: dict[str, float]) -> Figures:
    """What the run found."""
    found = Figures()
    sides = list(dict.fromkeys(run.side for run in runs))
    speeds = {s: statistics.median(r.rows_per_s for r in runs if r.side == s) for s in sides}
    chosen = {s: min((r for r in runs if r.side == s), key=lambda run: run.log_loss) for s in sides}
    peers = [side for side in sides if side != "ours"]
    for side in sides:
        found.add(f"rows per second, {side}", speeds[side], "rows/s")
    if peers:
        times = speeds["ours"] / max(speeds[side] for side in peers)
        found.add("rows per second, ours to the faster peer", times, "x", at_least=GOAL)
        more = chosen["ours"].log_loss - min(chosen[side].log_loss for side in peers)
        found.add("log loss, ours at its best less the better peer's", more, "nats", at_most=0)
    for side in sides:
        run = chosen[side]
        at = f" (learning rate {run.rate:g})"
        found.add(f"log loss, {side}{at}", run.log_loss, "nats")
        found.add(f"AUC, {side}{at}", run.auc, "")
        found.add(f"predicted clicks per real one, {side}{at}", run.pcoc, "")
    found.add("log loss, best possible", best, "nats")
    for side in sides:
        default = next(run for run in runs if run.side == side and run.rate == RATES[0])
        found.add(
            f"log loss, {side} (learning rate {RATES[0]:g}, the peers' default)",
            default.log_loss,
            "nats",
        )
    for name, speed in tiers.items():
        found.add(f"rows per second, {name} on Complete Journey, one thread", speed, "rows/s")
    return found


def _encoder() -> Encoder:
    """Any: only asked for the size of hashed tables."""
    spec = read_spec(ROOT / "training" / "datasets" / "complete_journey.toml")
    categorical, numeric = len(spec.of("item", "categorical")), len(spec.of("item", "numeric"))
    items = ItemTable.build(
        np.empty(0, np.uint64),
        np.empty((0, categorical), np.int32),
        np.empty((0, 2 * numeric), np.float32),
    )
    return Encoder(spec, {}, items)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Training speed beside other libraries.")
    parser.add_argument("--quick", action="store_true", help="small, and without the peers")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder")
    parser.add_argument("--data", type=Path, help="Complete Journey, imported (default: imports)")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else Size()
    if options.side:
        data, out, rate = options.side
        print(json.dumps(run_ours(Path(data), Path(out), float(rate), size)))
        return
    rows = options.out / "training-rows"
    best = write_rows(rows, size)
    runs = take_turns(rows, size, () if options.quick else PEERS)
    data = options.data or options.out / "journey"
    if not options.quick and not data.exists():
        import_complete_journey(data, source_folder())
    found = figures(runs, best, {} if options.quick else tier_speeds(data))
    found.write(options.out / "training.json")
    print(found)


if __name__ == "__main__":
    main()
