"""A-CTR, the advertisement model: CPM's parameters, fine-tuned on a month of ads data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import torch

from training.config import ActrConfig, NetworkConfig
from training.cpm import cpm_name
from training.examples import builder_for
from training.fit import calibration, fit, predict
from training.network import Network
from training.workspace import Workspace


@dataclass(frozen=True)
class Variant:
    """Which of the other tiers A-CTR builds on."""

    tpm: bool = True
    cpm: bool = True

    def name(self, asof: date) -> str:
        """Under which name the workspace keeps it."""
        without = ("" if self.tpm else "-without-tpm") + ("" if self.cpm else "-without-cpm")
        return f"actr-{asof}{without}"


FULL = Variant()


@dataclass(frozen=True)
class Actr:
    """A trained A-CTR, ready to be evaluated or exported."""

    network: Network
    offset: float
    """Calibration: added to the logit."""
    facts: dict[str, Any]


def train_actr(
    workspace: Workspace,
    asof: date,
    network: NetworkConfig,
    config: ActrConfig,
    seed: int,
    variant: Variant = FULL,
) -> str:
    """Trains A-CTR on the `config.days` days before `asof`, keeps it, and returns its name."""
    log = workspace.log()
    first, last = asof - timedelta(days=config.days), asof - timedelta(days=1)
    builder = builder_for(workspace, log, first, last, variant.tpm)
    examples = builder.build(log.rows("ad", first, last))
    torch.manual_seed(seed)
    model = Network(log.spec, log.encoder, network, builder.window_dim)
    cpm = _start_from_cpm(workspace, model, asof, variant) if variant.cpm else None
    loss = fit(model, examples, config.fit, seed, variant.name(asof))
    recent = examples.since(asof - timedelta(days=config.calibration_days))
    facts = {
        "from": str(first),
        "to": str(last),
        "seed": seed,
        "loss": loss,
        "offset": calibration(predict(model, recent), recent),
        "window_dim": builder.window_dim,
        "cpm": cpm,
    }
    workspace.save_model(variant.name(asof), model, facts)
    return variant.name(asof)


def load_actr(
    workspace: Workspace, asof: date, network: NetworkConfig, variant: Variant = FULL
) -> Actr:
    """Loads what `train_actr` kept."""
    log = workspace.log()
    command = f"ecdctr train actr --asof {asof}"
    facts = workspace.facts(variant.name(asof), command)
    model = Network(log.spec, log.encoder, network, facts["window_dim"])
    workspace.load_model(variant.name(asof), model, command)
    return Actr(model.eval(), facts["offset"], facts)


def _start_from_cpm(
    workspace: Workspace, model: Network, asof: date, variant: Variant
) -> dict[str, Any]:
    """Takes CPM's parameters over. Its normalisation statistics come along in the same file, but
    `fit` replaces them: those of the natural domain are not those of ads."""
    name = cpm_name(asof, variant.tpm)
    facts = workspace.load_model(name, model, f"ecdctr train cpm --asof {asof}")
    return {"name": name, **facts}
