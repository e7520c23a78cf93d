"""What can be chosen about a training run; `training.recipes` has the values that we use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Alignment = Literal["warm_start", "procrustes", "none"]


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the complete network."""

    hidden: tuple[int, int] = (128, 64)
    """Units of the two layers of the MLP."""
    interaction: int = 32
    """Number of products between learned projections of all inputs."""
    attention: int = 16
    """Size of query, key and value of the target attention."""
    dropout: float = 0.3
    """Share of hidden units dropped in training."""
    aggregator: str = "self_attention"
    """How a TPM window becomes one vector: a name in `training.aggregators`."""
    window_months: int = 3
    """Months of a TPM window; the store and the service know windows of three."""


@dataclass(frozen=True)
class FitConfig:
    """How one model is fitted."""

    passes: int = 1
    """Times each row is seen. More than one over-fits embeddings soon."""
    batch_size: int = 2048
    learning_rate: float = 3e-3
    """Of the dense parameters (Adam)."""
    table_learning_rate: float = 3e-3
    """Of the embedding tables (Adam)."""
    large_table_learning_rate: float = 0.02
    """Of tables from `training.tables.SPARSE_ROWS` rows on (row-wise Adagrad)."""
    weight_decay: float = 1e-4
    """Of the dense parameters."""
    ranking: float = 0.0
    """Weight of the ranking loss beside the click loss."""
    hidden_share: float = 0.02
    """Share of rows whose user window is hidden, and apart from that whose item window, whose
    numbers of one kind (user, context, item), and each single number."""
    warm_up_steps: int = 50
    part_days: int = 31
    """Most days whose rows are in memory at a time; days beyond come in parts, oldest first."""


@dataclass(frozen=True)
class TpmConfig:
    """The tiny pre-training model."""

    dim: int = 32
    """Size D of the vectors that a snapshot keeps."""
    history_months: int = 6
    """Months of natural data behind the first snapshot; each next one continues from the last."""
    store_negatives: int = 4
    catalogue_negatives: int = 2
    """Drawn anew from the whole catalogue per positive."""
    batch_size: int = 2048
    """Positives per step."""
    learning_rate: float = 0.01
    passes: int = 2
    """Times a snapshot's months are seen."""
    in_batch: float = 1.0
    """Weight of the in-batch softmax beside the click loss."""
    in_batch_size: int = 256
    alignment: Alignment = "warm_start"
    """How a month's axes come to be those of the month before: it continues that month's model; or
    starts from nothing, on `history_months`, and is turned onto that month's snapshot
    ("procrustes"); or starts from nothing and they don't."""
    min_cosine: float = 0.7
    """Below it, or above `max_residual`, a snapshot is held back (see `training.drift.Drift`).
    Months of Complete Journey that continue have cosines from 0.82 and residuals up to 0.57, those
    that start from nothing and are turned 0.72 and 0.73, those that are not turned 0.61 or less.
    Where the seed or the alignment changes, turning gives 0.66 and 0.80: that is held back."""
    max_residual: float = 0.85


@dataclass(frozen=True)
class CpmConfig:
    """The complete pre-training model."""

    days: int = 30
    """Days of natural data before the day it is trained for."""
    near_negatives: float = 2.0
    """Of the negatives in the log, per positive."""
    catalogue_negatives: int = 4
    """Drawn from the whole catalogue, per positive."""
    start_days: int = 30
    """It starts from the newest A-CTR that is at least as old, so that no A-CTR that starts from
    this CPM learns twice from the same ads; at random where there is none."""
    fit: FitConfig = FitConfig(passes=1)


@dataclass(frozen=True)
class ActrConfig:
    """The advertisement model."""

    days: int = 30
    """Days of ads data before the day it is trained for."""
    calibration_days: int = 7
    """Its most recent days, on which the logit's offset is set."""
    holdout_days: int = 0
    """Days just before the day it is trained for that it does not learn from: an update compares
    it with the live bundle on them, and then corrects its calibration by them. The `days` end
    before them."""
    holdout_prior: float = 60.0
    """As so many positives the calibration on `calibration_days` counts in that correction."""
    fit: FitConfig = FitConfig(passes=2, ranking=0.3)
    warm_passes: int = 1
    """Passes where CPM had started from an earlier A-CTR."""


@dataclass(frozen=True)
class GatesConfig:
    """What a bundle must be like on the held-out day before it is promoted."""

    requests: int = 300
    """Of the held-out day, all their candidates."""
    min_spread: float = 0.1
    """Standard deviation of the logits: a model whose scores are all alike ranks nothing."""
    gauc_tolerance: float = 0.005
    """How much lower GAUC may be than the live bundle's."""
    log_loss_tolerance: float = 0.02
    """How much higher log loss may be than the live bundle's, as a share of it."""
    pcoc_band: tuple[float, float] = (0.5, 2.0)
    """One day has few positives; the mailer alone moves it by a fifth."""
    allow_signature_change: bool = False
    """The graph's inputs may differ from the live bundle's."""


@dataclass(frozen=True)
class Schedule:
    """When an update trains what, and what may go live; A-CTR is trained every day, TPM when a
    month has ended."""

    cpm_days: int = 7
    """Age in days at which CPM is trained anew."""
    tpm_lag_days: int = 0
    """Days between a month's end and the first day whose rows may see its snapshot."""
    gates: GatesConfig = GatesConfig()
