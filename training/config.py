"""What can be chosen about a training run; `training.recipes` has the values that we use."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True)
class FitConfig:
    """How one model is fitted."""

    passes: int = 1
    """Times each row is seen. More than one over-fits embeddings soon."""
    batch_size: int = 2048
    learning_rate: float = 3e-3
    """Of the dense parameters (Adam)."""
    table_learning_rate: float = 3e-3
    """Of the embedding tables (Adam on the rows that a batch touches)."""
    weight_decay: float = 1e-4
    """Of the dense parameters."""
    ranking: float = 0.0
    """Weight of the ranking loss beside the click loss."""
    hidden_share: float = 0.02
    """Share of rows whose user window is hidden, and apart from that whose item window, whose
    numbers of one kind (user, context, item), and each single number."""
    warm_up_steps: int = 50


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


@dataclass(frozen=True)
class CpmConfig:
    """The complete pre-training model."""

    days: int = 30
    """Days of natural data before the day it is trained for."""
    near_negatives: float = 2.0
    """Of the negatives in the log, per positive."""
    catalogue_negatives: int = 4
    """Drawn from the whole catalogue, per positive."""
    fit: FitConfig = FitConfig(passes=1)


@dataclass(frozen=True)
class ActrConfig:
    """The advertisement model."""

    days: int = 30
    """Days of ads data before the day it is trained for."""
    calibration_days: int = 7
    """Its most recent days, on which the logit's offset is set."""
    fit: FitConfig = FitConfig(passes=2, ranking=0.3)
