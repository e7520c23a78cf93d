"""The complete network: as it trains on rows, so it serves one user with many items."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from training.actr import load_actr
from training.events import EventLog
from training.examples import Batch, Builder, builder_for
from training.network import Network
from training.requests import RequestMaker
from training.workspace import Workspace

USER_SIDE = ("user_", "context_", "history_")


@pytest.fixture(scope="module")
def network(tiny_workspace: Workspace) -> Network:
    return load_actr(tiny_workspace, tiny.ASOF, tiny.RECIPE.network).network


@pytest.fixture(scope="module")
def builder(tiny_workspace: Workspace, tiny_log: EventLog) -> Builder:
    return builder_for(tiny_workspace, tiny_log, tiny.ASOF, tiny.ASOF)


@pytest.fixture(scope="module")
def batches(tiny_log: EventLog, builder: Builder) -> list[Batch]:
    """A batch per request of a day: candidates of one page, for one user."""
    made = RequestMaker(tiny_log, builder, tiny.ASOF)
    pages = made.requests(tiny_log.full_lists([tiny.ASOF]))
    examples = [builder.build(rows) for _, rows in pages]
    return [one.batch(np.arange(len(one))) for one in examples]


@torch.no_grad()
def run(network: Network, batch: Batch) -> Tensor:
    logit: Tensor = network(batch)
    return logit


def one_user(batch: Batch) -> Batch:
    return {k: v[:1] if k.startswith(USER_SIDE) else v for k, v in batch.items()}


def test_one_row_of_the_user_side_is_that_row_repeated(
    network: Network, batches: list[Batch]
) -> None:
    for batch in batches:
        repeated, broadcast = run(network, batch), run(network, one_user(batch))
        torch.testing.assert_close(broadcast, repeated, atol=1e-5, rtol=0)
        assert broadcast.shape == (tiny.PAGE_SIZE,)
        assert len(set(broadcast.tolist())) > 1


def test_a_score_does_not_depend_on_the_other_rows(network: Network, batches: list[Batch]) -> None:
    batch = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
    together = run(network, batch)
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(0))
    shuffled = run(network, {name: tensor[order] for name, tensor in batch.items()})
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0)
    alone = run(network, {name: tensor[5:6] for name, tensor in batch.items()})
    torch.testing.assert_close(alone, together[5:6], atol=1e-5, rtol=0)


def degraded(batch: Batch, sides: tuple[str, ...], content: float) -> Batch:
    """With the windows of some sides away, whatever is in their place."""
    changed = dict(batch)
    for side in sides:
        changed[f"{side}_window"] = torch.full_like(batch[f"{side}_window"], content)
        present = batch[f"{side}_window_present"]
        changed[f"{side}_window_present"] = torch.zeros_like(present)
    return changed


@pytest.mark.parametrize("sides", [("user",), ("item",), ("user", "item")])
def test_scores_without_windows_are_finite_whatever_is_in_their_place(
    network: Network, batches: list[Batch], sides: tuple[str, ...]
) -> None:
    for batch in batches:
        expected = run(network, degraded(batch, sides, 0.0))
        assert expected.isfinite().all()
        for content in (math.nan, math.inf, 1e6):
            assert torch.equal(run(network, degraded(batch, sides, content)), expected)


def test_windows_that_are_there_change_scores(network: Network, batches: list[Batch]) -> None:
    batch = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
    for side in ("user", "item"):
        assert not torch.allclose(run(network, degraded(batch, (side,), 0.0)), run(network, batch))


def test_any_input_within_its_range_gives_a_finite_score(
    network: Network, batches: list[Batch]
) -> None:
    for value in (-1e6, 1e6):
        changed = {
            name: torch.full_like(tensor, value) if name.endswith("_num") else tensor
            for name, tensor in batches[0].items()
            if name != "history_num"
        }
        changed["history_num"] = torch.full_like(batches[0]["history_num"], abs(value))
        assert run(network, changed).isfinite().all()


def test_everything_missing_is_scored_all_the_same(network: Network, batches: list[Batch]) -> None:
    nothing = {name: torch.zeros_like(tensor) for name, tensor in batches[0].items()}
    scores = run(network, nothing)
    assert scores.isfinite().all()
    assert len(set(scores.tolist())) == 1


def inputs_that_matter(tiny_log: EventLog) -> Iterator[str]:
    yield from ("user_num", "context_num", "item_num", "match")
    yield from ("user_cat", "context_cat", "item_cat")


def test_every_kind_of_input_reaches_the_score(
    network: Network, batches: list[Batch], tiny_log: EventLog
) -> None:
    batch = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
    expected = run(network, batch)
    for name in inputs_that_matter(tiny_log):
        without = {**batch, name: torch.zeros_like(batch[name])}
        assert not torch.allclose(run(network, without), expected), name
    without = {**batch, "history_item": torch.zeros_like(batch["history_item"])}
    assert not torch.equal(run(network, without), expected)


def test_a_network_without_tpm_reads_no_window(
    tiny_log: EventLog, batches: list[Batch], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Network(tiny_log.spec, tiny_log.encoder, tiny.RECIPE.network, 0).eval()
    names = [name for name in batches[0] if "_window" in name]
    without = {name: tensor for name, tensor in batches[0].items() if name not in names}
    assert torch.equal(run(network, without), run(network, batches[0]))


def test_cpm_and_actr_have_the_same_parameters(tiny_log: EventLog) -> None:
    def shapes() -> dict[str, torch.Size]:
        network = Network(tiny_log.spec, tiny_log.encoder, tiny.RECIPE.network, 4)
        return {name: tensor.shape for name, tensor in network.state_dict().items()}

    assert shapes() == shapes()


def test_the_same_seed_gives_the_same_network(tiny_log: EventLog, batches: list[Batch]) -> None:
    def made(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return Network(tiny_log.spec, tiny_log.encoder, tiny.RECIPE.network, 4).state_dict()

    first, second, other = made(0), made(0), made(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_page_of_a_later_day_is_scored_with_later_features(
    tiny_workspace: Workspace, tiny_log: EventLog, network: Network
) -> None:
    days = [date(2017, 4, 5), date(2017, 4, 9)]
    builder = builder_for(tiny_workspace, tiny_log, *days)
    rows = tiny_log.full_lists([days[0]])
    later = rows.with_columns(date=days[1])
    one, other = (builder.build(frame) for frame in (rows, later))
    both = [run(network, part.batch(np.arange(len(part)))) for part in (one, other)]
    assert not torch.allclose(*both, atol=1e-3)
