"""How good scores are: AUC, GAUC, log loss, calibration, and how sure we are of it.

GAUC is the mean of per-user AUC weighted by the user's impressions (MKT, arXiv 2024, eq. 17).
Users whose impressions are all positive or all negative have no AUC: they are left out of both
sums, and counted. Ties share the average rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from scipy.stats import rankdata
from sklearn.metrics import log_loss, roc_auc_score

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Metrics:
    """One model on one set of rows."""

    auc: float
    gauc: float
    log_loss: float
    pcoc: float
    """Sum of predicted probabilities over number of positives: above 1 is too high."""
    rows: int
    positives: int
    users: int
    one_class_users: int
    """Left out of GAUC."""


@dataclass(frozen=True)
class UserAucs:
    """Per-user AUC float64 [U] (NaN where a user has one class only) and impressions [U]."""

    auc: Floats
    impressions: Ints

    def mean(self, times: Floats | None = None) -> float:
        """GAUC; `times` float64 [U] is how often each user was drawn, once by default."""
        known = ~np.isnan(self.auc)
        weight = self.impressions[known] * (1.0 if times is None else times[known])
        if not weight.sum():
            raise ValueError("no user has both positives and negatives: GAUC is not defined")
        return float(np.average(self.auc[known], weights=weight))


def measure(logit: Floats, label: npt.NDArray[np.float32], user: Ints) -> Metrics:
    """All metrics of logits [n] against labels [n] of users [n]."""
    probability = expit(logit)
    per_user = user_aucs(logit, label, user)
    return Metrics(
        auc=float(roc_auc_score(label, logit)),
        gauc=per_user.mean(),
        log_loss=float(log_loss(label, probability)),
        pcoc=float(probability.sum() / label.sum()),
        rows=len(label),
        positives=int(label.sum()),
        users=len(per_user.auc),
        one_class_users=int(np.isnan(per_user.auc).sum()),
    )


def user_aucs(score: Floats, label: npt.NDArray[np.float32], user: Ints) -> UserAucs:
    """AUC within each user, by rank sums (Mann and Whitney), ties by average rank."""
    _, group, impressions = np.unique(user, return_inverse=True, return_counts=True)
    # Ranks of (user, score) pairs: an offset per user makes all users' ranks one ranking.
    dense = rankdata(score, method="dense").astype(np.float64)
    rank = rankdata(group * (dense.max() + 1) + dense)
    before = np.concatenate([[0], np.cumsum(impressions)[:-1]])
    positives = np.bincount(group, label)
    rank_sum = np.bincount(group, (rank - before[group]) * label)
    pairs = positives * (impressions - positives)
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = (rank_sum - positives * (positives + 1) / 2) / pairs
    return UserAucs(np.where(pairs > 0, auc, np.nan), impressions)


def gauc_interval(
    scores: Floats,
    other: Floats | None,
    label: npt.NDArray[np.float32],
    user: Ints,
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[float, float]:
    """95 % interval of GAUC by bootstrap over users; of the difference to `other` where given
    (paired: both are measured on the same users)."""
    first = user_aucs(scores, label, user)
    second = None if other is None else user_aucs(other, label, user)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        times = rng.multinomial(len(first.auc), np.full(len(first.auc), 1 / len(first.auc)))
        value = first.mean(times.astype(np.float64))
        values.append(value - second.mean(times.astype(np.float64)) if second else value)
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
