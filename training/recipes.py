"""Complete sets of choices, each a function that returns one."""

from __future__ import annotations

from dataclasses import dataclass

from training.config import ActrConfig, CpmConfig, NetworkConfig, TpmConfig


@dataclass(frozen=True)
class Recipe:
    """All that is chosen about the three tiers."""

    network: NetworkConfig
    tpm: TpmConfig
    cpm: CpmConfig
    actr: ActrConfig


def complete_journey() -> Recipe:
    """The recipe whose results the documents quote; chosen on 18 to 31 October 2017."""
    return Recipe(NetworkConfig(), TpmConfig(), CpmConfig(), ActrConfig())
