"""One training loop for CPM and A-CTR."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from training.config import FitConfig
from training.distributed import World, device, world
from training.events import Ints
from training.examples import Batch, Examples
from training.network import Network
from training.parallel import counter
from training.parts import Parts
from training.tables import SPARSE_ROWS, Block, merged

Floats = npt.NDArray[np.float64]

_CHUNK = 8192
_SAMPLE = 65_536
"""Rows that the statistics are taken from."""


def fit(
    network: Network, examples: Examples | Parts, config: FitConfig, seed: int, name: str
) -> float:
    """Fits `network` in place and returns the mean click loss of the last tenth of the
    steps.

    Negatives were kept at a rate r, so positives' odds are 1/r too high in the log: the loss adds
    log(1/r) to the logit, and the logit itself stays that of the whole traffic. Beside the click
    loss stands a ranking one, the softmax over a request's candidates, as in JRC (Sheng et al.,
    arXiv 2208.06164); whole requests are in a batch for it.

    Parts are learned from one after the other, each shuffled, with the statistics of the newest.
    Where several processes fit, each has rows of its own, and all end with the same network.

    Raises:
        DistributedError: they do not, or one has too few rows.
    """
    team, to = world(), device()
    parts = Parts([lambda: examples]) if isinstance(examples, Examples) else examples
    torch.manual_seed(seed + team.rank)
    rng = np.random.default_rng(seed + team.rank)
    _prepare(network, parts.newest, rng)
    team.follow_first(network.to(to))
    losses: list[Tensor] = []
    times = config.passes * len(parts)
    network.train()
    tables, size = network.tables.values(), config.batch_size
    with merged(tables, size) as blocks, counter(name) as bar:
        optimizers = _optimizers(network, config)
        loop = _Loop(network, optimizers, blocks, config, rng, team, to, bar)
        for time in range(times):
            # Not kept in a name: it would still be there while the next one is built.
            losses += loop.run(parts[time % len(parts)], time, times)
    network.eval().cpu()
    team.verify(network, name)
    last = torch.stack(losses[-max(len(losses) // 10, 1) :])
    return team.sum(float(last.mean())) / team.size


@dataclass(frozen=True)
class _Loop:
    """What stays the same over all steps of a run."""

    network: Network
    optimizers: list[tuple[torch.optim.Optimizer, float]]
    blocks: list[Block]
    config: FitConfig
    rng: np.random.Generator
    team: World
    to: torch.device
    bar: tqdm[NoReturn]

    def run(self, examples: Examples, time: int, times: int) -> list[Tensor]:
        """One pass over a part, the `time`-th of `times`; the click loss of every step."""
        order = _order(examples, self.config, self.rng)
        batches = self.team.batches(order, self.config.batch_size)
        first, num_steps = time * len(batches), times * len(batches)
        self.bar.total = num_steps
        losses = []
        for step, rows in enumerate(batches, first):
            rate = _schedule(step, num_steps, self.config.warm_up_steps)
            losses.append(self._step(examples, rows, rate))
            self.bar.update()
        return losses

    def _step(self, examples: Examples, rows: Ints, rate: float) -> Tensor:
        batch = examples.batch(rows)
        _hide(batch, self.config.hidden_share, self.rng)
        offset = torch.from_numpy(np.log(examples.weight[rows])).to(self.to)
        label = torch.from_numpy(examples.label[rows]).to(self.to)
        logit = self.network({name: tensor.to(self.to) for name, tensor in batch.items()})
        click = binary_cross_entropy_with_logits(logit + offset, label)
        loss = click
        if self.config.ranking:
            ranking = ranking_loss(logit, label, examples.request_id[rows])
            loss = click + self.config.ranking * ranking
        # Of the mean over the rows of all processes, this is what belongs to the own ones.
        (loss * self.team.share(len(rows))).backward()  # type: ignore[no-untyped-call]
        self._update(rate)
        return click.detach()

    def _update(self, rate: float) -> None:
        for optimizer, _ in self.optimizers:
            parameters = optimizer.param_groups[0]["params"]
            self.team.add(p.grad for p in parameters if p.grad is not None)
        for optimizer, learning_rate in self.optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # Not by the schedule: Adagrad slows down by itself, each row by what it has seen. What is
        # rare, and first comes late, must learn as much as what came early.
        for block in self.blocks:
            block.step(self.config.large_table_learning_rate, self.team)


@torch.no_grad()
def predict(network: Network, examples: Examples) -> Floats:
    """Logits float64 [n] of all examples."""
    network.eval()
    chunks = [network(examples.batch(rows)) for rows in _chunks(len(examples))]
    return torch.cat(chunks).double().numpy()


def calibration(logit: Floats, examples: Examples, prior: float = 0.0) -> float:
    """The offset that makes the predicted positives of `examples` as many as the real ones.

    Sampled negatives count 1 / rate. Only an offset: a slope would fit the noise of few positives.
    prior: so many positives more, of which just as many were predicted; they hold the offset near
    0 where `examples` has few. Of several processes each gives rows of its own, or all the same,
    and gets the offset of all.
    """
    team, times = world(), examples.times
    real = team.sum(float(examples.label.sum()) + prior)
    if not real:
        return 0.0

    def excess(offset: float) -> float:
        predicted = float((expit(logit + offset) * times).sum())
        return team.sum(predicted + prior * math.exp(offset)) - real

    return float(brentq(excess, -30.0, 30.0))


def _prepare(network: Network, newest: Examples, rng: np.random.Generator) -> None:
    """Takes statistics, and the rate of positives, from a sample of the newest part."""
    sample = np.sort(rng.choice(len(newest), min(len(newest), _SAMPLE), replace=False))
    network.fit_statistics(newest.batch(sample))
    _centre(network, newest, sample)


@torch.no_grad()
def _centre(network: Network, examples: Examples, rows: Ints) -> None:
    """Starts at the rate of positives of this domain; the optimiser's small steps would need
    thousands to take the bias there."""
    network.eval()
    sample = examples.take(rows)
    network.logit.bias.add_(calibration(predict(network, sample), sample))


def _chunks(num: int) -> Iterator[Ints]:
    for start in range(0, num, _CHUNK):
        yield np.arange(start, min(start + _CHUNK, num))


def _order(examples: Examples, config: FitConfig, rng: np.random.Generator) -> Ints:
    """Rows in a new order, those of one request side by side where they are ranked."""
    if not config.ranking:
        return np.argsort(rng.permutation(len(examples)))
    _, request = np.unique(examples.request_id, return_inverse=True)
    return np.argsort(rng.permutation(request.max() + 1)[request], kind="stable")


def ranking_loss(logit: Tensor, label: Tensor, request_id: Ints) -> Tensor:
    """Minus the log of each positive's share in the softmax over its request, per row."""
    names, place = np.unique(request_id, return_inverse=True)
    request = torch.from_numpy(place).to(logit.device)
    highest = logit.new_full((len(names),), -torch.inf)
    highest = highest.scatter_reduce(0, request, logit.detach(), "amax")[request]
    total = logit.new_zeros(len(names)).scatter_add(0, request, torch.exp(logit - highest))
    log_share = logit - highest - torch.log(total[request])
    return -(log_share * label).sum() / len(label)


def _hide(batch: Batch, share: float, rng: np.random.Generator) -> None:
    """Hides whole windows, and single numbers, so that the network knows what to do when the store
    is away or a caller leaves something out."""
    for name in ("user_window_present", "item_window_present"):
        kept = torch.from_numpy(rng.random((len(batch[name]), 1)) >= share)
        batch[name] = batch[name] & kept
    for name in ("user_num", "context_num", "item_num"):
        rows, width = batch[name].shape
        kept = torch.from_numpy(_kept_numbers(rows, width // 2, share, rng))
        batch[name] = batch[name] * kept.repeat_interleave(2, dim=1)


def _kept_numbers(
    rows: int, num: int, share: float, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """float32 [rows, num]: 0 for single numbers, and for all of a row's, by chance; else 1."""
    single, whole = rng.random((rows, num)) >= share, rng.random((rows, 1)) >= share
    return (single & whole).astype(np.float32)


def _optimizers(network: Network, config: FitConfig) -> list[tuple[torch.optim.Optimizer, float]]:
    """Of all that is in no block."""
    small: list[nn.Parameter] = []
    dense: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if not name.startswith("tables."):
            dense.append(parameter)
        elif len(parameter) < SPARSE_ROWS:
            small.append(parameter)
    decay = config.weight_decay
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(dense, weight_decay=decay, fused=True), config.learning_rate)
    ]
    if small:
        adam = torch.optim.AdamW(small, weight_decay=decay, fused=True)
        optimizers.append((adam, config.table_learning_rate))
    return optimizers


def _schedule(step: int, num_steps: int, warm_up: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * cosine)
