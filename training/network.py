"""The complete network: CPM and A-CTR are two instances of it, trained on different domains.

Read `forward` from top to bottom. Shape suffixes as in `training.layers`; the user side has B or 1
rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bundle.encode import Encoder
from bundle.match import match_width
from bundle.spec import Spec
from training.aggregators import AGGREGATORS
from training.config import NetworkConfig
from training.examples import Batch
from training.layers import (
    FieldEmbeddings,
    Numbers,
    SplitLinear,
    Standardise,
    TargetAttention,
)

WINDOW_FACTS = 6
"""Numbers that the network reads of a pair of TPM windows."""


class Network(nn.Module):
    """Logit of a click, from user, context, candidate, their history and their TPM windows."""

    def __init__(
        self, spec: Spec, encoder: Encoder, config: NetworkConfig, window_dim: int
    ) -> None:
        """window_dim: D of the TPM window (without its bias); 0 leaves TPM out."""
        super().__init__()
        self.config, self.window_dim = config, window_dim
        self.tables = nn.ModuleDict()
        self.user_fields = FieldEmbeddings(spec.of("user", "categorical"), encoder, self.tables)
        self.context_fields = FieldEmbeddings(
            spec.of("context", "categorical"), encoder, self.tables
        )
        self.item_fields = FieldEmbeddings(spec.of("item", "categorical"), encoder, self.tables)
        matched = [spec[name] for name in spec.history.match]
        self.matched_fields = FieldEmbeddings(matched, encoder, self.tables)
        item_names = [f.name for f in spec.of("item", "categorical")]
        self.matched_columns = [item_names.index(f.name) for f in matched]
        self.attend = spec.history.attend

        self.user_numbers = Numbers(len(spec.of("user", "numeric")))
        self.context_numbers = Numbers(len(spec.of("context", "numeric")))
        self.item_numbers = Numbers(len(spec.of("item", "numeric")))
        self.match_numbers = Standardise(match_width(len(matched)))
        step = self.matched_fields.width + 2
        self.attention = TargetAttention(self.matched_fields.width, step, config.attention)

        user = self.user_fields.width + self.user_numbers.width
        user += self.context_fields.width + self.context_numbers.width
        item = self.item_fields.width + self.item_numbers.width
        item += self.match_numbers.width + self.attention.width
        if window_dim:
            aggregator, months = AGGREGATORS[config.aggregator], config.window_months
            self.user_window = aggregator(window_dim + 1, months)
            self.item_window = aggregator(window_dim + 1, months)
            self.window_numbers = Standardise(WINDOW_FACTS)
            item += WINDOW_FACTS
        self.left = SplitLinear(user, item, config.interaction)
        self.right = SplitLinear(user, item, config.interaction)
        self.first = SplitLinear(user, item, config.hidden[0])
        self.interaction = nn.Linear(config.interaction, config.hidden[0], bias=False)
        self.second = nn.Linear(config.hidden[0], config.hidden[1])
        self.dropout = nn.Dropout(config.dropout)
        self.wide = SplitLinear(user, item, 1)
        self.logit = nn.Linear(config.hidden[1], 1)
        nn.init.zeros_(self.logit.weight)
        for part in (self.wide.user, self.wide.item):
            nn.init.zeros_(part.weight)

    def forward(self, x: Batch) -> Tensor:
        """Logits float32 [B] of named inputs as in `Examples.batch`: the history is cut to its
        newest `attend` steps, and `match` holds what `HardMatch` found in all of it."""
        user = [
            self.user_fields(x["user_cat"]),
            self.user_numbers(x["user_num"]),
            self.context_fields(x["context_cat"]),
            self.context_numbers(x["context_num"]),
        ]
        item = [
            self.item_fields(x["item_cat"]),
            self.item_numbers(x["item_num"]),
            self.match_numbers(x["match"]),
            self._attended(x),
        ]
        if self.window_dim:
            item.append(self.window_numbers(self._windows(x)))
        return self._mix(torch.cat(user, 1), torch.cat(item, 1))

    @torch.no_grad()
    def fit_statistics(self, x: Batch) -> None:
        """Takes the statistics of all numeric inputs from a large batch."""
        self.user_numbers.fit(x["user_num"])
        self.context_numbers.fit(x["context_num"])
        self.item_numbers.fit(x["item_num"])
        self.match_numbers.fit(x["match"])
        if self.window_dim:
            self.window_numbers.fit(self._windows(x))

    def _attended(self, x: Batch) -> Tensor:
        # Detached: the candidates train the tables that they share with the history, as well as
        # both together do, and a step takes half the time.
        history = self.matched_fields(x["history_cat"]).detach()
        steps = torch.cat([history, torch.log1p(x["history_num"])], dim=2)
        target = self.matched_fields(x["item_cat"][:, self.matched_columns])
        attended: Tensor = self.attention(target, steps, x["history_item"] > 0)
        return attended

    def _windows(self, x: Batch) -> Tensor:
        """Facts [B, WINDOW_FACTS] of the pair of aggregated vectors: their dot product, both
        biases, how the item's bias moved over the window, and whether each side has one at all.
        The vectors themselves, and their products by dimension, are left out: they identify users
        and items, which a month of ads is too short to generalise from (measured)."""
        size, items = self.window_dim, x["item_window"]
        user = self.user_window(x["user_window"], x["user_window_present"])
        item = self.item_window(items, x["item_window_present"])
        dot = (user[:, :size] * item[:, :size]).sum(1, keepdim=True)
        first, last = x["item_window_present"][:, :1], x["item_window_present"][:, -1:]
        moved = torch.where(first & last, items[:, 0, size:] - items[:, -1, size:], 0.0)
        user_known = x["user_window_present"].any(1, keepdim=True).to(item.dtype)
        item_known = x["item_window_present"].any(1, keepdim=True).to(item.dtype)
        of_user = torch.cat([user[:, size:], user_known], dim=1).expand(item.shape[0], 2)
        return torch.cat([dot, item[:, size:], moved, item_known, of_user], dim=1)

    def _mix(self, user_BH: Tensor, item_BH: Tensor) -> Tensor:
        products = self.left(user_BH, item_BH) * self.right(user_BH, item_BH)
        hidden = self.dropout(torch.relu(self.first(user_BH, item_BH) + self.interaction(products)))
        hidden = self.dropout(torch.relu(self.second(hidden)))
        logit: Tensor = self.logit(hidden) + self.wide(user_BH, item_BH)
        return logit[:, 0]
