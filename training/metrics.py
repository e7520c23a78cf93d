"""How good scores are: AUC, GAUC, log loss, calibration, and how sure we are of it.

GAUC is the mean of per-user AUC weighted by the user's impressions (MKT, arXiv 2024, eq. 17).
Users whose impressions are all positive or all negative have no AUC: they are left out of both
sums, and counted. Ties share the average rank.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def mean(self) -> float:
        """GAUC."""
        known = ~np.isnan(self.auc)
        if not known.any():
            raise ValueError("no user has both positives and negatives: GAUC is not defined")
        return float(np.average(self.auc[known], weights=self.impressions[known]))


def measure(logit: Floats, label: npt.NDArray[np.float32], user: Ints) -> Metrics:
    """All metrics of logits [n] against labels [n] of users [n]."""
    probability = expit(logit)
    per_user = user_aucs(logit, label, user)
    return Metrics(
        auc=float(roc_auc_score(label, logit)),
        gauc=per_user.mean(),
        log_loss=float(log_loss(label, probability)),
        pcoc=pcoc(logit, label),
        rows=len(label),
        positives=int(label.sum()),
        users=len(per_user.auc),
        one_class_users=int(np.isnan(per_user.auc).sum()),
    )


def pcoc(logit: Floats, label: npt.NDArray[np.float32]) -> float:
    """Sum of predicted probabilities over number of positives."""
    return float(expit(logit).sum() / label.sum())


def has_gauc(label: npt.NDArray[np.float32], user: Ints) -> bool:
    """Whether some user has positives and negatives; GAUC is not defined otherwise."""
    _, place, impressions = np.unique(user, return_inverse=True, return_counts=True)
    positives = np.bincount(place, label)
    return bool(((positives > 0) & (positives < impressions)).any())


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


@dataclass(frozen=True)
class PerUser:
    """What intervals are made of: for each user the AUC float64 [U] (NaN where there is one class
    only), the impressions [U] and the sum of log loss [U]; means over models where there are
    several, such as seeds of one."""

    auc: Floats
    impressions: Floats
    loss: Floats

    @classmethod
    def of(cls, logits: Sequence[Floats], label: npt.NDArray[np.float32], user: Ints) -> PerUser:
        """logits: float64 [n] of each model, on the same rows."""
        _, place, impressions = np.unique(user, return_inverse=True, return_counts=True)
        aucs = [user_aucs(logit, label, user).auc for logit in logits]
        losses = [np.bincount(place, _losses(logit, label)) for logit in logits]
        times = impressions.astype(np.float64)
        return cls(np.mean(aucs, axis=0), times, np.mean(losses, axis=0))

    def gauc(self, times_RU: Floats) -> Floats:
        """GAUC float64 [R] of R resamples, which say how often each user was drawn."""
        known = ~np.isnan(self.auc)
        weight = times_RU[:, known] * self.impressions[known]
        # A resample may have no user with both classes; it says nothing then.
        with np.errstate(invalid="ignore"):
            means: Floats = weight @ self.auc[known] / weight.sum(1)
        return means

    def log_loss(self, times_RU: Floats) -> Floats:
        means: Floats = (times_RU @ self.loss) / (times_RU @ self.impressions)
        return means


def resample(num_users: int, resamples: int = 1000, seed: int = 0) -> Floats:
    """How often each user is drawn, float64 [R, U], in a bootstrap over users."""
    share = np.full(num_users, 1 / num_users)
    drawn = np.random.default_rng(seed).multinomial(num_users, share, resamples)
    return drawn.astype(np.float64)


def interval(values: Floats) -> tuple[float, float]:
    """The 95 % interval of resampled values."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


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
    own = PerUser.of([scores], label, user)
    times = resample(len(own.impressions), resamples, seed)
    values = own.gauc(times)
    if other is not None:
        values = values - PerUser.of([other], label, user).gauc(times)
    return interval(values)


def _losses(logit: Floats, label: npt.NDArray[np.float32]) -> Floats:
    """Minus log likelihood of each row; softplus, so that no probability is rounded to 0 or 1."""
    signed = np.where(label > 0, -logit, logit)
    losses: Floats = np.logaddexp(0.0, signed)
    return losses
