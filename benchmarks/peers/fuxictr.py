"""FuxiCTR's side of `benchmarks.training`, run by the Python that it is installed in:

python fuxictr.py DATA OUT RATE THREADS FIELDS VOCABULARY DIM HIDDEN BATCH

Its wheel has layers, loaders and the base model, but not its model zoo: the network is put together
from them as its DNN is.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

# This file has the name of the package.
sys.path.pop(0)

import numpy as np
import pyarrow.parquet as pq
import torch
import torch._dynamo  # an optimiser's first step imports it, for seconds
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel


class Dnn(BaseModel):
    def __init__(
        self, feature_map: FeatureMap, fields: int, dim: int, hidden: list[int], rate: float
    ) -> None:
        super().__init__(
            feature_map, "dnn", verbose=0, model_root=tempfile.mkdtemp(), metrics=["logloss"]
        )
        self.embedding_layer = FeatureEmbedding(feature_map, dim)
        self.mlp = MLP_Block(fields * dim, hidden, output_dim=1)
        self.compile("adam", "binary_crossentropy", rate)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict) -> dict:
        embedded = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        return {"y_pred": self.output_activation(self.mlp(embedded))}


def made_map(fields: int, vocabulary: int, dim: int) -> FeatureMap:
    made = FeatureMap("bench", ".")
    made.labels, made.default_emb_dim = ["label"], dim
    for i in range(fields):
        made.features[f"f{i}"] = {"type": "categorical", "source": "", "vocab_size": vocabulary}
    made.num_fields = fields
    made.set_column_index()
    return made


def written(folder: Path, target: Path) -> int:
    """Puts rows where its loader reads them from; their number."""
    table = pq.read_table(folder)
    np.savez(target, **{name: table[name].to_numpy() for name in table.column_names})
    return table.num_rows


def main(data: Path, out: Path, rate: float, threads: int, *sizes: int) -> None:
    fields, vocabulary, dim, *hidden, batch_size = sizes
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    feature_map = made_map(fields, vocabulary, dim)
    model = Dnn(feature_map, fields, dim, list(hidden), rate)
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{name}.npz" for name in ("train", "test")}
        rows = {name: written(data / name, file) for name, file in files.items()}
        train, _ = RankDataLoader(
            feature_map,
            stage="train",
            train_data=str(files["train"]),
            batch_size=batch_size,
            shuffle=True,
            data_format="npz",
        )
        test = RankDataLoader(
            feature_map,
            stage="test",
            test_data=str(files["test"]),
            batch_size=65_536,
            data_format="npz",
        )
    # What `fit` does, without the evaluation and the checkpoint at its end.
    model._max_gradient_norm, model._total_steps, model._eval_steps = 10.0, 0, sys.maxsize
    model._stop_training, model._epoch_index = False, 0
    start = time.perf_counter()
    model.train_epoch(train)
    seconds = time.perf_counter() - start
    np.save(out, model.predict(test))
    print(json.dumps({"seconds": seconds, "rows": rows["train"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))
