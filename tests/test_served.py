"""The network as it is served gives the logits of the network, whatever a request knows."""

from __future__ import annotations

import tomllib

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from bundle.encode import Encoder
from bundle.items import ItemTable
from bundle.spec import Spec, parse_spec
from training.config import NetworkConfig
from training.examples import Batch
from training.layers import Standardise
from training.network import Network
from training.served import ItemSide, RequestSide

NUM, STEPS, DIM = 9, 4, 3
OFFSET = -0.7


def spec_with(given: set[str]) -> Spec:
    document = tomllib.loads(tiny.FEATURES)
    for feature in document["feature"]:
        if feature["name"] in given:
            feature["given"] = True
    return parse_spec(document)


def network_of(spec: Spec, window_dim: int) -> Network:
    """Untrained, but nothing in it is zero."""
    numbers = len(spec.of("item", "numeric"))
    categories = len(spec.of("item", "categorical"))
    items = ItemTable.build(
        np.zeros(0, np.uint64), np.zeros((0, categories), np.int32), np.zeros((0, 2 * numbers), "f")
    )
    known = {
        f.table: ["a", "b", "c"]
        for entity in ("user", "item")
        for f in spec.of(entity, "categorical")
        if f.encoding == "vocabulary"
    }
    torch.manual_seed(3)
    config = NetworkConfig(hidden=(16, 8), interaction=4, attention=4)
    network = Network(spec, Encoder(spec, known, items), config, window_dim)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for module in network.modules():
        if isinstance(module, Standardise):
            module.mean.normal_(std=0.5)
            module.scale.uniform_(0.5, 2.0)
    return network.eval()


def pairs(rows: int, features: int) -> Tensor:
    """Values and marks [rows, 2 features], a third of them missing."""
    present = (torch.rand(rows, features) > 0.33).float()
    return torch.stack([torch.randn(rows, features) * present, present], dim=2).flatten(1)


def inputs(spec: Spec, network: Network, steps: int) -> Batch:
    """Of one user and NUM candidates; what only a request knows is in `item_*` too, as the whole
    network reads it."""
    torch.manual_seed(5)
    cat = {e: len(spec.of(e, "categorical")) for e in ("user", "context", "item")}
    num = {e: len(spec.of(e, "numeric")) for e in ("user", "context", "item")}
    rows = {"user": 1, "context": 1, "item": NUM}
    batch = {f"{e}_cat": torch.randint(0, 4, (rows[e], cat[e]), dtype=torch.int32) for e in rows}
    batch |= {f"{e}_num": pairs(rows[e], num[e]) for e in rows}
    real = (torch.arange(STEPS) < steps).long()[None]
    batch["history_item"] = real * 7
    batch["history_cat"] = torch.randint(1, 4, (1, STEPS, 1), dtype=torch.int32) * real[..., None]
    batch["history_num"] = torch.rand(1, STEPS, 2) * 9 * real[..., None]
    batch["match"] = torch.rand(NUM, network.match_numbers.width) * 5
    for side, num_rows in (("user", 1), ("item", NUM)):
        batch[f"{side}_window"] = torch.randn(num_rows, 3, DIM + 1)
        batch[f"{side}_window_present"] = torch.rand(num_rows, 3) > 0.3
    return batch


def split(spec: Spec, whole: Batch) -> tuple[Batch, Batch]:
    """For the item's side, which has none of what only a request knows, and for the request's."""
    items, request = dict(whole), dict(whole)
    cat = [i for i, f in enumerate(spec.of("item", "categorical")) if f.given]
    num = [i for i, f in enumerate(spec.of("item", "numeric")) if f.given]
    both = [column for i in num for column in (2 * i, 2 * i + 1)]
    items["item_cat"], items["item_num"] = whole["item_cat"].clone(), whole["item_num"].clone()
    items["item_cat"][:, cat], items["item_num"][:, both] = 0, 0.0
    request["given_cat"], request["given_num"] = (
        whole["item_cat"][:, cat],
        whole["item_num"][:, both],
    )
    return items, request


@pytest.mark.parametrize("steps", [0, 2, STEPS])
@pytest.mark.parametrize("window_dim", [0, DIM])
@pytest.mark.parametrize(
    "given",
    [set(), {"slot"}, {"page_same_kind"}, {"slot", "brand", "page_same_kind"}],
    ids=["nothing", "a category", "a number", "several"],
)
@torch.no_grad()
def test_both_sides_together_are_the_network(given: set[str], window_dim: int, steps: int) -> None:
    spec = spec_with(given)
    network = network_of(spec, window_dim)
    whole = inputs(spec, network, steps)
    items, request = split(spec, whole)
    item_side, request_side = ItemSide(network), RequestSide(network, spec, OFFSET)
    request["item_part"] = item_side(*(items[name] for name in item_side.names()))
    found = request_side(*(request[name] for name in request_side.names()))
    torch.testing.assert_close(found, torch.sigmoid(network(whole) + OFFSET), atol=2e-6, rtol=1e-5)
    assert found.std() > 0.01
