"""CPM, the complete pre-training model: the network of A-CTR on a month of natural data.

It does not start from nothing, but from what A-CTR knew a month before. So what ads of earlier
months taught is not lost, though A-CTR itself reads only one month of them.
"""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import polars as pl
import torch

from training.config import CpmConfig, NetworkConfig
from training.distributed import own_rows, world
from training.events import EventLog
from training.examples import Builder, Examples
from training.fit import fit
from training.network import Network
from training.parts import Span, parts_of_days
from training.workspace import Workspace


def train_cpm(
    workspace: Workspace,
    asof: date,
    network: NetworkConfig,
    config: CpmConfig,
    seed: int,
    with_tpm: bool = True,
) -> str:
    """Trains CPM on the `config.days` days before `asof`, keeps it, and returns its name."""
    log = workspace.log()
    first, last = asof - timedelta(days=config.days), asof - timedelta(days=1)

    def build(part: Span, builder: Builder) -> Examples:
        drawn = seed + (part.first - first).days
        return builder.build(cpm_rows(log, part.first, part.last, config, drawn))

    parts = parts_of_days(workspace, log, Span(first, last), config.fit.part_days, build, with_tpm)
    torch.manual_seed(seed)
    model = Network(log.spec, log.encoder, network, parts.newest.window_dim)
    start = earlier_actr(workspace, asof, config) if with_tpm else None
    if start:
        workspace.load_model(start, model, "ecdctr train actr")
    loss = fit(model, parts, config.fit, seed, "cpm")
    name = cpm_name(asof, with_tpm)
    facts = {"from": str(first), "to": str(last), "seed": seed, "loss": loss, "start": start}
    world().first_only(lambda: workspace.save_model(name, model, facts))
    return name


def cpm_name(asof: date, with_tpm: bool = True) -> str:
    """Under which name the workspace keeps the CPM of a day."""
    return f"cpm-{asof}" + ("" if with_tpm else "-without-tpm")


def earlier_actr(workspace: Workspace, asof: date, config: CpmConfig) -> str | None:
    """The newest A-CTR that is old enough to start from; None where there is none yet."""
    day = workspace.newest("actr-{}".format, asof - timedelta(days=config.start_days))
    return f"actr-{day}" if day else None


def cpm_rows(log: EventLog, first: date, last: date, config: CpmConfig, seed: int) -> pl.DataFrame:
    """The natural rows that CPM is trained on, in order of date; of several processes, this one's.

    Of the log's negatives `near_negatives` per positive are kept: they come from what a store sells
    and so never show an item that nobody buys. `catalogue_negatives` per positive do; they are
    copies of the positive with an item drawn from the whole catalogue.
    """
    rng = np.random.default_rng(seed + world().rank)
    rows = own_rows(log, "natural", first, last)
    positive = rows.filter(pl.col("label") == 1)
    logged = rows.filter(pl.col("label") == 0)
    share = min(1.0, config.near_negatives * len(positive) / max(len(logged), 1))
    near = logged.filter(pl.Series(rng.random(len(logged)) < share))
    repeated = positive[np.repeat(np.arange(len(positive)), config.catalogue_negatives)]
    drawn = log.items.ids[rng.integers(0, len(log.items.ids), len(repeated))]
    # The type is named, since there may be none of them.
    items = pl.Series(drawn.tolist(), dtype=rows.schema["item_id"])
    far = repeated.with_columns(item_id=items, label=pl.lit(0, pl.Int8))
    return pl.concat([positive, near, far]).sort("date", maintain_order=True)
