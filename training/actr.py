"""A-CTR, the advertisement model: CPM's parameters, fine-tuned on a month of ads data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Any

import torch

from training.config import ActrConfig, NetworkConfig
from training.cpm import cpm_name
from training.distributed import world
from training.examples import Builder, Examples, builder_for
from training.fit import calibration, fit, predict
from training.network import Network
from training.parts import Span, parts_of_days
from training.workspace import Workspace

_DAY = timedelta(days=1)


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
    correction: float
    """What of the offset the held-out days have added."""
    facts: dict[str, Any]


def train_actr(
    workspace: Workspace,
    asof: date,
    network: NetworkConfig,
    config: ActrConfig,
    seed: int,
    variant: Variant = FULL,
) -> str:
    """Trains A-CTR on the `config.days` days before those held out, corrects its calibration by
    these, keeps it, and returns its name."""
    log = workspace.log()
    first, last = actr_days(asof, config)

    def build(part: Span, builder: Builder) -> Examples:
        return builder.days("ad", part.first, part.last)

    parts = parts_of_days(
        workspace, log, Span(first, last), config.fit.part_days, build, variant.tpm
    )
    torch.manual_seed(seed)
    model = Network(log.spec, log.encoder, network, parts.newest.window_dim)
    cpm = _start_from_cpm(workspace, model, asof, variant) if variant.cpm else None
    warm = cpm is not None and cpm.get("start") is not None
    passes = config.warm_passes if warm else config.fit.passes
    loss = fit(model, parts, replace(config.fit, passes=passes), seed, variant.name(asof))
    recent = parts.since(last - timedelta(days=config.calibration_days - 1))
    offset = calibration(predict(model, recent), recent)
    correction = 0.0
    if config.holdout_days:
        held_out = _held_out(workspace, Span(last + _DAY, asof - _DAY), variant)
        logit = predict(model, held_out) + offset
        correction = calibration(logit, held_out, config.holdout_prior)
    facts = {
        "from": str(first),
        "to": str(last),
        "seed": seed,
        "loss": loss,
        "offset": offset + correction,
        "correction": correction,
        "window_dim": model.window_dim,
        "cpm": cpm,
    }
    world().first_only(lambda: workspace.save_model(variant.name(asof), model, facts))
    return variant.name(asof)


def actr_days(asof: date, config: ActrConfig) -> tuple[date, date]:
    """The first and the last day that the A-CTR of a day learns from."""
    last = asof - timedelta(days=1 + config.holdout_days)
    return last - timedelta(days=config.days - 1), last


def _held_out(workspace: Workspace, span: Span, variant: Variant) -> Examples:
    log = workspace.log()
    builder = builder_for(workspace, log, span.first, span.last, variant.tpm)
    # All rows in each process: a day can't be shared out.
    return builder.build(log.rows("ad", span.first, span.last))


def newest_cpm(workspace: Workspace, asof: date, with_tpm: bool = True) -> date | None:
    """The newest day, up to `asof`, that a CPM has been trained for."""
    return workspace.newest(lambda day: cpm_name(day, with_tpm), asof)


def load_actr(
    workspace: Workspace, asof: date, network: NetworkConfig, variant: Variant = FULL
) -> Actr:
    """Loads what `train_actr` kept."""
    log = workspace.log()
    command = f"ecdctr train actr --asof {asof}"
    facts = workspace.facts(variant.name(asof), command)
    model = Network(log.spec, log.encoder, network, facts["window_dim"])
    workspace.load_model(variant.name(asof), model, command)
    return Actr(model.eval(), facts["offset"], facts["correction"], facts)


def _start_from_cpm(
    workspace: Workspace, model: Network, asof: date, variant: Variant
) -> dict[str, Any]:
    """Takes the parameters of the newest CPM over. Its normalisation statistics come along in the
    same file, but `fit` replaces them: those of the natural domain are not those of ads."""
    name = cpm_name(newest_cpm(workspace, asof, variant.tpm) or asof, variant.tpm)
    facts = workspace.load_model(name, model, f"ecdctr train cpm --asof {asof}")
    return {"name": name, **facts}
