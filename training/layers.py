"""Building blocks that more than one tier uses.

Shape suffixes: B rows (user side: 1 or B), L history steps, F fields, D vector size, M matched
features, H hidden units. Whatever belongs to the user may have one row, which is then broadcast:
the same modules train on rows and serve one user with many items.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bundle.encode import AGE, COUNT, Encoder
from bundle.spec import Feature

SPARSE_ROWS = 20_000
"""From this many rows on, a table's optimiser only touches the rows of the batch."""
MATCH_VALUES = 6
"""Numbers per matched level: present, log distinct items, log count, log decayed count, log recent
items, log age."""
DECAY_DAYS = 30.0
"""An item this old counts for 1/e in the decayed count."""
RECENT_DAYS = 14.0
"""An item this old counts for 1/e of a recent item."""
NEVER_DAYS = 1000.0
"""The age of what has not been there: older than all that has."""


class FieldEmbeddings(nn.Module):
    """One table per name; features that name the same table share it. Row 0 is *missing*."""

    def __init__(
        self, features: Sequence[Feature], encoder: Encoder, tables: nn.ModuleDict
    ) -> None:
        super().__init__()
        # A dim of 0 says that only TPM uses the feature.
        self._columns = [i for i, feature in enumerate(features) if feature.dim]
        used = [features[i] for i in self._columns]
        for feature in used:
            if feature.table not in tables:
                rows = encoder.table_size(feature)
                table = nn.Embedding(rows, feature.dim, sparse=rows >= SPARSE_ROWS)
                nn.init.normal_(table.weight, std=0.02)
                tables[feature.table] = table
        # A plain list: the tables belong to the network, which has each of them once.
        self._tables = [tables[feature.table] for feature in used]
        self.width = sum(feature.dim for feature in used)

    def forward(self, index_BF: Tensor) -> Tensor:
        """float32 [B, sum of dims] of indices int32 [B, F]."""
        pairs = zip(self._columns, self._tables, strict=True)
        columns = [table(index_BF[..., i]) for i, table in pairs]
        # So that there is a result where no feature is used at all.
        nothing = torch.zeros((*index_BF.shape[:-1], 0))
        return torch.cat([nothing, *columns], dim=-1)


class Standardise(nn.Module):
    """Shifts and scales columns by fixed statistics of the training rows, and clips outliers.

    Unlike a batch normalisation's, the statistics are exact and the same in training and serving.
    They belong to a domain, so they are never carried from one model to another.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.width = width

    @torch.no_grad()
    def fit(self, rows_BW: Tensor) -> None:
        """Takes mean and standard deviation from rows float32 [B, W]."""
        self.mean.copy_(rows_BW.double().mean(0))
        self.scale.copy_(1.0 / rows_BW.double().std(0).clamp(min=1e-3))

    def forward(self, rows_BW: Tensor) -> Tensor:
        standard: Tensor = (rows_BW - self.mean) * self.scale
        return standard.clamp(-6.0, 6.0)


class Aggregator(nn.Module):
    """Self-attention over the three monthly vectors of a window, pooled into one vector.

    Each month attends to all that are present; the pooled vector is the mean over them, so an
    entity without any month gets zeros, and a mark says so.
    """

    def __init__(self, size: int, hidden: int = 16) -> None:
        super().__init__()
        self.query, self.key = (
            nn.Linear(size, hidden, bias=False),
            nn.Linear(size, hidden, bias=False),
        )
        self.value = nn.Linear(size, size, bias=False)
        self.month = nn.Parameter(torch.zeros(3))
        nn.init.eye_(self.value.weight)
        self._scale = hidden**-0.5

    def forward(self, window_B3D: Tensor, present_B3: Tensor) -> Tensor:
        """float32 [B, D] of a window float32 [B, 3, D] and its presence bool [B, 3]."""
        window = torch.where(present_B3[..., None], window_B3D, 0.0)
        scores = self.query(window) @ self.key(window).transpose(1, 2) * self._scale + self.month
        scores = torch.where(present_B3[:, None, :], scores, -1e9)
        mixed: Tensor = torch.softmax(scores, dim=2) @ self.value(window)
        marks = present_B3.to(mixed.dtype)[..., None]
        return (mixed * marks).sum(1) / marks.sum(1).clamp(min=1.0)


def match_width(num_matched: int) -> int:
    """Columns that `HardMatch` gives for the item itself and `num_matched` of its features."""
    return MATCH_VALUES * (1 + num_matched) + 2


class HardMatch(nn.Module):
    """What one user's history says of each candidate itself, and of its matched features: has the
    same one been there, how often, how long ago; and how long the history is. Has no parameters,
    so training computes it once."""

    def __init__(self, columns: Sequence[int]) -> None:
        """columns: where the matched features stand in `item_cat`."""
        super().__init__()
        self._columns = list(columns)
        self.width = match_width(len(columns))

    def forward(
        self,
        history_item_1L: Tensor,
        history_cat_1LM: Tensor,
        history_num_1L2: Tensor,
        item_key_B: Tensor,
        item_cat_BF: Tensor,
    ) -> Tensor:
        """float32 [B, MATCH_VALUES * (1 + M) + 2]. Padding (0) and missing features match
        nothing."""
        age_L, count_L = history_num_1L2[0, :, AGE], history_num_1L2[0, :, COUNT]
        real_L = (history_item_1L[0] > 0).to(count_L.dtype)
        decayed_L, recent_L = torch.exp(-age_L / DECAY_DAYS), torch.exp(-age_L / RECENT_DAYS)
        sums_L4 = torch.stack([real_L, count_L, count_L * decayed_L, recent_L], dim=1)
        levels = [(history_item_1L[0], item_key_B)]
        levels += [
            (history_cat_1LM[0, :, m], item_cat_BF[:, column])
            for m, column in enumerate(self._columns)
        ]
        found = [_level(history, item, age_L, sums_L4) for history, item in levels]
        totals = torch.log1p((sums_L4[:, :2] * real_L[:, None]).sum(0))
        return torch.cat([*found, totals.expand(item_key_B.shape[0], 2)], dim=1)


def _level(history_L: Tensor, item_B: Tensor, age_L: Tensor, sums_L4: Tensor) -> Tensor:
    """MATCH_VALUES columns of one level."""
    same_BL = (history_L[None] == item_B[:, None]) & (history_L > 0)[None]
    sums_B4 = torch.log1p(same_BL.to(sums_L4.dtype) @ sums_L4)
    present = (sums_B4[:, :1] > 0).to(sums_L4.dtype)
    newest = torch.where(same_BL, age_L, NEVER_DAYS).amin(1, keepdim=True)
    return torch.cat([present, sums_B4, torch.log1p(newest)], dim=1)


class TargetAttention(nn.Module):
    """The candidate attends to the newest part of the history; heads are dot products, so that the
    history's share of the work is done once per user."""

    def __init__(self, target: int, step: int, hidden: int = 32) -> None:
        super().__init__()
        self.query = nn.Linear(target, hidden)
        self.key, self.value = nn.Linear(step, hidden), nn.Linear(step, hidden)
        self.width = hidden
        self._scale = hidden**-0.5

    def forward(self, target_BH: Tensor, steps_BLH: Tensor, present_BL: Tensor) -> Tensor:
        """float32 [B, hidden] of targets [B, .], steps [B or 1, L, .], presence bool [., L]."""
        query: Tensor = self.query(target_BH) * self._scale
        key: Tensor = self.key(steps_BLH)
        value: Tensor = self.value(steps_BLH)
        scores = (query[:, None, :] * key).sum(2) if key.shape[0] != 1 else query @ key[0].T
        scores = torch.where(present_BL, scores, -1e9)
        weights = torch.softmax(scores, dim=1) * present_BL
        if value.shape[0] != 1:
            return (weights[:, :, None] * value).sum(1)
        return weights @ value[0]


class SplitLinear(nn.Module):
    """A linear map of [user, item], computed for each side apart and added: the user's share has
    one row when there is one user."""

    def __init__(self, user: int, item: int, out: int) -> None:
        super().__init__()
        self.user, self.item = nn.Linear(user, out), nn.Linear(item, out, bias=False)

    def forward(self, user_BH: Tensor, item_BH: Tensor) -> Tensor:
        total: Tensor = self.user(user_BH) + self.item(item_BH)
        return total
