"""DeepCTR-Torch's side of `benchmarks.training`, run by the Python that it is installed in:

python deepctr_torch.py DATA OUT RATE THREADS FIELDS VOCABULARY DIM HIDDEN BATCH
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

# This file has the name of the package.
sys.path.pop(0)

import numpy as np
import pyarrow.parquet as pq
import torch
import torch._dynamo  # an optimiser's first step imports it, for seconds
from deepctr_torch.inputs import SparseFeat
from deepctr_torch.models import DeepFM


def read(folder: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    table = pq.read_table(folder)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    return columns, columns.pop("label").astype(np.float32)


def main(data: Path, out: Path, rate: float, threads: int, *sizes: int) -> None:
    fields, vocabulary, dim, *hidden, batch_size = sizes
    torch.set_num_threads(threads)
    features = [SparseFeat(f"f{i}", vocabulary, dim) for i in range(fields)]
    # Without its FM and linear parts it is a plain network over embeddings; without its penalty on
    # whole tables it is faster.
    model = DeepFM(
        [], features, use_fm=False, dnn_hidden_units=hidden, l2_reg_embedding=0, l2_reg_linear=0
    )
    model.compile(torch.optim.Adam(model.parameters(), lr=rate), "binary_crossentropy")
    x, y = read(data / "train")
    start = time.perf_counter()
    model.fit(x, y, batch_size=batch_size, epochs=1, verbose=0)
    seconds = time.perf_counter() - start
    held_out, _ = read(data / "test")
    np.save(out, model.predict(held_out, 65_536)[:, 0])
    print(json.dumps({"seconds": seconds, "rows": len(y)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))
