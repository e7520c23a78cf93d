"""Building blocks that more than one tier uses.

Shape suffixes: B rows (user side: 1 or B), L history steps, F fields, D vector size, M matched
features, H hidden units. Whatever belongs to the user may have one row, which is then broadcast:
the same modules train on rows and serve one user with many items.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from bundle.encode import AGE, COUNT, Encoder
from bundle.match import DECAY_DAYS, NEVER_DAYS, RECENT_DAYS, match_width
from bundle.spec import Feature
from training.tables import SMALL, SPARSE_ROWS, Table


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
                table = Table(rows, feature.dim)
                nn.init.normal_(table.weight, std=0.02 if rows < SPARSE_ROWS else SMALL)
                tables[feature.table] = table
        # A plain list: the tables belong to the network, which has each of them once.
        self._tables: list[Table] = [tables[feature.table] for feature in used]  # type: ignore[misc]
        self.width = sum(feature.dim for feature in used)

    def forward(self, index_BF: Tensor) -> Tensor:
        """float32 [B, sum of dims] of indices int32 [B, F]."""
        parts: list[Tensor] = []
        pairs = zip(self._columns, self._tables, strict=True)
        for block, run in groupby(pairs, lambda pair: pair[1].block if self.training else None):
            if block is None:
                parts += [table(index_BF[..., i]) for i, table in run]
            else:
                columns, tables = zip(*run, strict=True)
                parts.append(block.rows(index_BF[..., list(columns)], tables).flatten(-2))
        if not parts:
            return torch.zeros((*index_BF.shape[:-1], 0), device=index_BF.device)
        # What is alone is large: joined with nothing it would be copied twice a step.
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


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
    def fit(self, rows_BW: Tensor, weight_BW: Tensor | None = None) -> None:
        """Takes mean and standard deviation from rows float32 [B, W], weighted where given. A
        column that never varies, or has no weight, is only shifted."""
        rows = rows_BW.double()
        weight = torch.ones_like(rows) if weight_BW is None else weight_BW.double()
        total = weight.sum(0).clamp(min=1.0)
        mean = (rows * weight).sum(0) / total
        deviation = ((rows - mean).square() * weight).sum(0).div(total).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(deviation > 1e-3, 1.0 / deviation.clamp(min=1e-3), 1.0))

    def forward(self, rows_BW: Tensor) -> Tensor:
        standard: Tensor = (rows_BW - self.mean) * self.scale
        return standard.clamp(-6.0, 6.0)


class Numbers(nn.Module):
    """Encoded numeric features: standardised values, and marks of what is missing.

    What is missing has the value of the mean. Values are hidden now and then in training, so that
    the network knows what to make of a mark.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.standardise = Standardise(num_features)
        self.width = 2 * num_features

    def fit(self, pairs_B2G: Tensor) -> None:
        """Takes the statistics of the values that are present."""
        self.standardise.fit(pairs_B2G[:, 0::2], pairs_B2G[:, 1::2])

    def forward(self, pairs_B2G: Tensor) -> Tensor:
        """float32 [B, 2 G] of pairs of value and presence, float32 [B, 2 G]."""
        value, present = pairs_B2G[:, 0::2], pairs_B2G[:, 1::2]
        return torch.cat([self.standardise(value) * present, 1.0 - present], dim=1)


class HardMatch(nn.Module):
    """What one user's history says of each candidate itself, and of its matched features: has the
    same one been there, how often, how long ago; and how long the history is. Has no parameters,
    so training computes it once, and serving outside of the graph (`bundle.match`)."""

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
        age_L = history_num_1L2[0, :, AGE].clamp(max=NEVER_DAYS)
        count_L = history_num_1L2[0, :, COUNT]
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
    """The candidate attends to the newest part of the history.

    Keys are the steps themselves, and values are projected after they are pooled: the same function
    as with projections of every step, for a fraction of the work, nearly all of it per candidate.
    """

    def __init__(self, target: int, step: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(target, step)
        self.value = nn.Linear(step, width)
        self.width = width
        self._scale = step**-0.5

    def forward(self, target_BH: Tensor, steps_BLS: Tensor, present_BL: Tensor) -> Tensor:
        """float32 [B, width] of targets [B, H], steps [B or 1, L, S], presence bool [., L].
        Without any step the pooled one is zero."""
        query_BS: Tensor = self.query(target_BH) * self._scale
        shared = steps_BLS.shape[0] == 1
        if shared:
            scores_BL = query_BS @ steps_BLS[0].T
        else:
            scores_BL = torch.bmm(steps_BLS, query_BS[:, :, None])[:, :, 0]
        scores_BL = torch.where(present_BL, scores_BL, -1e9)
        weights_BL = torch.softmax(scores_BL, dim=1) * present_BL
        if shared:
            pooled_BS = weights_BL @ steps_BLS[0]
        else:
            pooled_BS = torch.bmm(weights_BL[:, None, :], steps_BLS)[:, 0]
        pooled: Tensor = self.value(pooled_BS)
        return pooled


class SplitLinear(nn.Module):
    """A linear map of [user, item], computed for each side apart and added: the user's share has
    one row when there is one user."""

    def __init__(self, user: int, item: int, out: int) -> None:
        super().__init__()
        self.user, self.item = nn.Linear(user, out), nn.Linear(item, out, bias=False)

    def forward(self, user_BH: Tensor, item_BH: Tensor) -> Tensor:
        total: Tensor = self.user(user_BH) + self.item(item_BH)
        return total
