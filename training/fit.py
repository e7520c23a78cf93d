"""One training loop for CPM and A-CTR."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from training.config import FitConfig
from training.events import Ints
from training.examples import Batch, Examples
from training.layers import SPARSE_ROWS
from training.network import Network
from training.parallel import progress

Floats = npt.NDArray[np.float64]

_CHUNK = 8192
_SAMPLE = 65_536
"""Rows that the statistics are taken from."""


def fit(network: Network, examples: Examples, config: FitConfig, seed: int, name: str) -> float:
    """Fits `network` in place and returns the mean click loss of the last tenth of the
    steps.

    Negatives were kept at a rate r, so positives' odds are 1/r too high in the log: the loss adds
    log(1/r) to the logit, and the logit itself stays that of the whole traffic. Beside the click
    loss stands a ranking one, the softmax over a request's candidates, as in JRC (Sheng et al.,
    arXiv 2208.06164); whole requests are in a batch for it.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    num_steps = config.passes * math.ceil(len(examples) / config.batch_size)
    sample = rng.choice(len(examples), min(len(examples), _SAMPLE), replace=False)
    network.fit_statistics(examples.batch(np.sort(sample)))
    _centre(network, examples, np.sort(sample))
    optimizers = _optimizers(network, config)
    losses: list[Tensor] = []
    network.train()
    for step, rows in enumerate(progress(_batches(examples, config, rng), name, num_steps)):
        rate = _schedule(step, num_steps, config.warm_up_steps)
        batch = examples.batch(rows)
        _hide(batch, config.hidden_share, rng)
        offset = torch.from_numpy(np.log(examples.weight[rows]))
        label = torch.from_numpy(examples.label[rows])
        logit = network(batch)
        click = binary_cross_entropy_with_logits(logit + offset, label)
        loss = click
        if config.ranking:
            loss = click + config.ranking * ranking_loss(logit, label, examples.request_id[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer, learning_rate in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(click.detach())
    network.eval()
    return float(torch.stack(losses[-max(num_steps // 10, 1) :]).mean())


@torch.no_grad()
def predict(network: Network, examples: Examples) -> Floats:
    """Logits float64 [n] of all examples."""
    network.eval()
    chunks = [network(examples.batch(rows)) for rows in _chunks(len(examples))]
    return torch.cat(chunks).double().numpy()


def calibration(logit: Floats, examples: Examples) -> float:
    """The offset that makes the predicted positives of `examples` as many as the real ones.

    Sampled negatives count 1 / rate. Only an offset: a slope would fit the noise of few positives.
    """
    times = np.where(examples.label > 0, 1.0, examples.weight)
    real = float(examples.label.sum())
    if not real:
        return 0.0

    def excess(offset: float) -> float:
        return float((expit(logit + offset) * times).sum()) - real

    return float(brentq(excess, -30.0, 30.0))


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


def _batches(examples: Examples, config: FitConfig, rng: np.random.Generator) -> Iterator[Ints]:
    """Rows in a new order each pass; those of one request side by side where they are ranked."""
    group = examples.request_id if config.ranking else np.arange(len(examples))
    _, request = np.unique(group, return_inverse=True)
    for _ in range(config.passes):
        order = np.argsort(rng.permutation(request.max() + 1)[request], kind="stable")
        for start in range(0, len(order), config.batch_size):
            yield order[start : start + config.batch_size]


def ranking_loss(logit: Tensor, label: Tensor, request_id: Ints) -> Tensor:
    """Minus the log of each positive's share in the softmax over its request, per row."""
    names, place = np.unique(request_id, return_inverse=True)
    request = torch.from_numpy(place)
    highest = torch.full((len(names),), -torch.inf)
    highest = highest.scatter_reduce(0, request, logit.detach(), "amax")[request]
    total = torch.zeros(len(names)).scatter_add(0, request, torch.exp(logit - highest))
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
    small: list[nn.Parameter] = []
    large: list[nn.Parameter] = []
    dense: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if not name.startswith("tables."):
            dense.append(parameter)
        else:
            (large if len(parameter) >= SPARSE_ROWS else small).append(parameter)
    decay = config.weight_decay
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(dense, weight_decay=decay, fused=True), config.learning_rate)
    ]
    if small:
        adam = torch.optim.AdamW(small, weight_decay=decay, fused=True)
        optimizers.append((adam, config.table_learning_rate))
    if large:
        optimizers.append((torch.optim.SparseAdam(large), config.table_learning_rate))
    return optimizers


def _schedule(step: int, num_steps: int, warm_up: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * cosine)
