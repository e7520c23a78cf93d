"""TPM, the tiny pre-training model: a few basic features, long natural data, one vector and one
bias per user and per item, kept as a monthly snapshot.

A user's (an item's) vector is the sum of the embeddings of its basic features; the logit of a
click is their dot product plus both biases. Being sums, the vectors mean something alone, which is
what the other tiers need of them. The sum over an attribute also gives a vector to items that
nobody has touched yet.
"""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date, timedelta

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from bundle.ids import Keys
from embeddings_store import ENTITIES, Entity, Snapshot, read_snapshot
from training.config import TpmConfig
from training.distributed import device, own_rows, world
from training.drift import measure_drift, rotation
from training.events import Entities, EventLog, Ints
from training.parallel import progress
from training.workspace import Workspace, WorkspaceError


@dataclass(frozen=True)
class Groups:
    """Positives with their negatives: user rows [n], item rows [n, 1 + S], the positive first; a
    negative that is the positive's own item is padding and has weight 0."""

    user: Ints
    item: Ints
    weight: npt.NDArray[np.float32]


class Tower(nn.Module):
    """Vectors and biases of one entity: sums over its basic features' embeddings."""

    def __init__(self, index: npt.NDArray[np.int32], dim: int) -> None:
        """index: int32 [n, F], each entity's basic features as rows of F tables."""
        super().__init__()
        self.index: Tensor
        self.register_buffer("index", torch.from_numpy(index), persistent=False)
        tables = [nn.Embedding(int(column.max()) + 1, dim + 1) for column in index.T]
        for table in tables:
            nn.init.normal_(table.weight, std=0.05)
            nn.init.zeros_(table.weight[:, dim])
        self.tables = nn.ModuleList(tables)

    def forward(self, row: Tensor) -> Tensor:
        """float32 [..., D + 1] of entity rows [...]."""
        fields = self.index[row]
        total: Tensor = self.tables[0](fields[..., 0])
        for i, table in enumerate(self.tables[1:], start=1):
            total = total + table(fields[..., i])
        return total


class Tpm(nn.Module):
    """Both towers and the overall bias."""

    def __init__(self, log: EventLog, config: TpmConfig) -> None:
        super().__init__()
        self.config = config
        self.users = Tower(_basic(log, "user", log.users), config.dim)
        self.items = Tower(_basic(log, "item", log.items), config.dim)
        self.bias = nn.Parameter(torch.tensor(-1.8))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(len(log.users.ids), dtype=torch.bool))

    def forward(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, S] of user rows [B] and item rows [B, S], and both sides' vectors."""
        size = self.config.dim
        user_BD, item_BSD = self.users(user), self.items(item)
        dot = torch.bmm(item_BSD[..., :size], user_BD[:, :size, None])[..., 0]
        return dot + item_BSD[..., size] + user_BD[:, size:] + self.bias, user_BD, item_BSD

    @torch.no_grad()
    def turn(self, rotation_DD: Tensor) -> None:
        """Turns all vectors by an orthogonal matrix float32 [D, D]; every dot product stays."""
        for table in (*self.users.tables, *self.items.tables):
            vectors = table.weight[:, : self.config.dim]
            vectors.copy_(vectors @ rotation_DD)

    @torch.no_grad()
    def snapshot(self, log: EventLog, month: str) -> dict[Entity, Snapshot]:
        """What a month leaves behind, by entity: the users it has seen so far, and all items, for
        an item's attributes speak for it."""
        every_item = np.ones(len(log.items.ids), np.bool_)
        return {
            "users": _snapshot(self.users, log.users.keys, self.seen.numpy(), month),
            "items": _snapshot(self.items, log.items.keys, every_item, month),
        }


def train_through(
    workspace: Workspace, last_month: str, num_months: int, config: TpmConfig, seed: int
) -> list[str]:
    """Trains the snapshots of the `num_months` months up to `last_month` that are not there yet,
    each from the one before it, and returns their names. The first of all starts from nothing, on
    `config.history_months` months; with another alignment than "warm_start" all do.

    A snapshot that has moved too far from the one before it is held back, and no later month is
    trained until it is released or removed: see `Workspace.held`."""
    log = workspace.log()
    trained = []
    for month in months_until(last_month, num_months):
        if any(month >= held for held in workspace.held()):
            break
        if month in workspace.months():
            continue
        _refuse_gap(workspace, month)
        if _train_month(workspace, log, month, config, seed):
            trained.append(month)
    return trained


def _train_month(
    workspace: Workspace, log: EventLog, month: str, config: TpmConfig, seed: int
) -> bool:
    """Whether the month's snapshots may be served; they are held back otherwise."""
    torch.manual_seed(seed)
    model = Tpm(log, config)
    before, first = months_until(month, 2)[0], month
    previous = _snapshots(workspace, before)
    if previous and config.alignment == "warm_start":
        workspace.load_model(f"tpm-{before}", model, f"ecdctr train tpm --through {before}")
    else:
        first = months_until(month, config.history_months)[0]
    loss = train_tpm(model, log, _first_day(first), _last_day(month), seed)
    if previous and config.alignment == "procrustes":
        model.turn(torch.from_numpy(rotation(previous, model.snapshot(log, month))))
    snapshots = model.snapshot(log, month)
    drifts = [measure_drift(entity, previous[entity], snapshots[entity]) for entity in previous]
    facts = {"first": first, "last": month, "seed": seed, "loss": loss}
    facts["drift"] = [asdict(drift) for drift in drifts]
    reasons = [reason for drift in drifts for reason in drift.reasons(config)]

    def keep() -> None:
        workspace.save_model(f"tpm-{month}", model, facts)
        if reasons:
            workspace.hold(month, snapshots, reasons)
        else:
            workspace.write_snapshots(snapshots)

    world().first_only(keep)
    return not reasons


def _snapshots(workspace: Workspace, month: str) -> dict[Entity, Snapshot]:
    """By entity; empty where the month has none."""
    if month not in workspace.months():
        return {}
    return {entity: read_snapshot(workspace.root, entity, month) for entity in ENTITIES}


def _refuse_gap(workspace: Workspace, month: str) -> None:
    later = [m for m in workspace.months() if m > month]
    if later:
        raise WorkspaceError(
            f"snapshot {month} is missing, but {', '.join(later)} did not continue from it;"
            f" remove snapshots/{later[0]} and later, then run this again"
        )


def months_until(month: str, num: int) -> list[str]:
    """The `num` months that end with `month`, oldest first: "2017-10", 2 -> 2017-09, 2017-10."""
    number = int(month[:4]) * 12 + int(month[5:]) - 1
    numbers = range(number - num + 1, number + 1)
    return [f"{n // 12}-{n % 12 + 1:02d}" for n in numbers]


def train_tpm(model: Tpm, log: EventLog, first: date, last: date, seed: int) -> float:
    """Continues `model` on the natural data of first .. last, month by month, and returns the mean
    loss of the last tenth of the steps. One month is in memory at a time. Of several processes
    each has its own days of a month, and all end with the same model."""
    team = world()
    rng = np.random.default_rng(seed + team.rank)
    torch.manual_seed(seed + team.rank)
    model.to(device())
    optimizer = torch.optim.Adam(
        model.parameters(), lr=model.config.learning_rate, betas=(0.9, 0.99), fused=True
    )
    losses: list[Tensor] = []
    months = list(_months(first, last)) * model.config.passes
    for month in progress(months, f"tpm {last:%Y-%m}", unit="month"):
        losses += _learn(model, optimizer, log, *month, rng)
    model.cpu()
    team.verify(model, f"tpm {last:%Y-%m}")
    return team.sum(float(torch.stack(losses[-max(len(losses) // 10, 1) :]).mean())) / team.size


def _learn(
    model: Tpm,
    optimizer: torch.optim.Optimizer,
    log: EventLog,
    first: date,
    last: date,
    rng: np.random.Generator,
) -> list[Tensor]:
    """One pass over a month; the click loss of every step."""
    team, losses = world(), []
    groups = _groups(log, first, last, rng, model.config)
    log_share = _log_share(groups.item[:, 0], len(log.items.ids)).to(model.seen.device)
    model.seen[torch.from_numpy(groups.user)] = True
    team.any(model.seen)
    for rows in team.batches(rng.permutation(len(groups.user)), model.config.batch_size):
        loss, click = _loss(model, groups, rows, log_share)
        optimizer.zero_grad(set_to_none=True)
        (loss * team.share(len(rows))).backward()  # type: ignore[no-untyped-call]
        team.add(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(click.detach())
    return losses


def _loss(model: Tpm, groups: Groups, rows: Ints, log_share: Tensor) -> tuple[Tensor, Tensor]:
    config, to = model.config, model.seen.device
    item = torch.from_numpy(groups.item[rows]).to(to)
    logit, user_BD, item_BSD = model(torch.from_numpy(groups.user[rows]).to(to), item)
    label = torch.zeros_like(logit)
    label[:, 0] = 1.0
    weight = torch.from_numpy(groups.weight[rows]).to(to)
    click = binary_cross_entropy_with_logits(logit, label, weight)
    num = len(rows) // config.in_batch_size
    if not config.in_batch or not num:
        return click * logit.shape[1], click
    ranking = _in_batch(user_BD, item_BSD[:, 0], item[:, 0], log_share, num, config)
    return click * logit.shape[1] + config.in_batch * ranking, click


def _in_batch(
    user_BD: Tensor, item_BD: Tensor, item: Tensor, log_share: Tensor, num: int, config: TpmConfig
) -> Tensor:
    """Softmax over the positives of the same part of a batch, corrected for how often an item is
    there (sampled softmax, Bengio and Senecal 2008)."""
    size, dim = config.in_batch_size, config.dim
    taken = num * size
    users = user_BD[:taken, :dim].view(num, size, dim)
    items = item_BD[:taken].view(num, size, dim + 1)
    ids = item[:taken].view(num, size)
    logit = users @ items[..., :dim].transpose(1, 2)
    logit = logit + (items[..., dim] - log_share[ids]).unsqueeze(1)
    own = torch.eye(size, dtype=torch.bool, device=ids.device)
    same = (ids[:, :, None] == ids[:, None, :]) & ~own
    logit = logit.masked_fill(same, -1e4)
    return cross_entropy(logit.reshape(-1, size), torch.arange(size, device=ids.device).repeat(num))


def _groups(
    log: EventLog, first: date, last: date, rng: np.random.Generator, config: TpmConfig
) -> Groups:
    """A month of positives, each with negatives of its own request and of the whole catalogue."""
    rows = own_rows(log, "natural", first, last)
    user = log.users.rows(rows["user_id"].to_numpy())
    item = log.items.rows(rows["item_id"].to_numpy())
    request, positive = rows["request_id"].to_numpy(), rows["label"].to_numpy() == 1
    taken = np.flatnonzero(positive)
    near = _same_request(request, taken, np.flatnonzero(~positive), rng, config.store_negatives)
    shape = (len(taken), config.catalogue_negatives)
    far = rng.integers(0, len(log.items.ids), shape)
    negatives = np.concatenate([np.where(near >= 0, item[near], item[taken, None]), far], axis=1)
    items = np.concatenate([item[taken, None], negatives], axis=1)
    weight = (items != items[:, :1]).astype(np.float32)
    weight[:, 0] = 1.0
    return Groups(user[taken], items, weight)


def _same_request(
    request: Ints, taken: Ints, others: Ints, rng: np.random.Generator, num: int
) -> Ints:
    """Rows int64 [len(taken), num] of negatives of the same request, -1 where it has none."""
    if not others.size:
        return np.full((len(taken), num), -1)
    sorted_others = others[np.argsort(request[others], kind="stable")]
    names = request[sorted_others]
    start, end = (np.searchsorted(names, request[taken], side) for side in ("left", "right"))
    size = (end - start)[:, None]
    place = start[:, None] + (rng.random((len(taken), num)) * size).astype(np.int64)
    found = sorted_others[np.minimum(place, len(sorted_others) - 1)]
    return np.where(size > 0, found, -1)


def _log_share(item: Ints, num_items: int) -> Tensor:
    counts = np.bincount(item, minlength=num_items)
    return torch.from_numpy(np.log(np.maximum(counts, 1) / len(item)).astype(np.float32))


def _basic(log: EventLog, entity: str, entities: Entities) -> npt.NDArray[np.int32]:
    """Basic features int32 [n, F]. The id itself stands in its row number: no two ids collide."""
    names = log.spec.of(entity, "categorical")  # type: ignore[arg-type]
    columns = [
        np.arange(len(entities.ids), dtype=np.int32)
        if feature.name == f"{entity}_id"
        else entities.categorical[:, i]
        for i, feature in enumerate(names)
        if feature.basic
    ]
    return np.stack(columns, axis=1)


def _snapshot(tower: Tower, keys: Keys, kept: npt.NDArray[np.bool_], month: str) -> Snapshot:
    order = np.argsort(keys)
    order = order[kept[order]]
    rows = tower(torch.from_numpy(order)).numpy()
    return Snapshot(month, keys[order], rows[:, :-1].copy(), rows[:, -1].copy())


def _months(first: date, last: date) -> Iterator[tuple[date, date]]:
    """The calendar months of first .. last, cut to it."""
    start = first
    while start <= last:
        end = min(_last_day(f"{start:%Y-%m}"), last)
        yield start, end
        start = end + timedelta(days=1)


def _first_day(month: str) -> date:
    return date(int(month[:4]), int(month[5:]), 1)


def _last_day(month: str) -> date:
    return date(int(month[:4]), int(month[5:]), monthrange(int(month[:4]), int(month[5:]))[1])
