"""The experiments: which arms each one compares, on which days."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta

from embeddings_store.precision import PRECISIONS
from experiments.arms import Arm, Split
from experiments.features import SHORT
from experiments.references import REFERENCES, TREES_AND_WINDOWS
from training.config import ActrConfig, CpmConfig, FitConfig, TpmConfig
from training.datasets.synthetic import SyntheticConfig
from training.recipes import Recipe, complete_journey
from training.tpm import months_until


@dataclass(frozen=True)
class Size:
    """How large experiments are: what they are made from, and how often."""

    base: Arm
    split: Split
    seeds: tuple[int, ...]
    few_days: int = 5
    """Days of ads where they are very few."""
    links: int = 7
    """A-CTRs one after the other before the last: the ads log is as long as eight of them."""
    log_months: int = 10
    """Months of natural data before the split."""
    cycles: int = 6
    """Months over which forgetting is followed."""
    world: SyntheticConfig = field(default_factory=SyntheticConfig)
    """What synthetic data are like."""


@dataclass(frozen=True)
class Cell:
    """One point of one series."""

    series: str
    x: str
    arm: Arm
    split: Split
    baseline: bool = False
    """Lifts of the other cells at the same x are measured against this one; where a point has
    none, against the first one of all."""
    world: SyntheticConfig | None = None
    """Synthetic data, instead of the workspace's."""


@dataclass(frozen=True)
class Experiment:
    """A question and the cells that answer it."""

    name: str
    title: str
    question: str
    x: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    segments: bool = False
    """Also measured on the users, and on the items, that the ads learned from did not have."""
    costs: bool = False
    """Also says what CPU time a day costs, on schedule (an older CPM) and in full."""


FULL = Size(
    base=Arm(),
    split=Split(date(2017, 11, 1), date(2017, 11, 1), date(2017, 11, 14), 300),
    seeds=(0, 1, 2),
)
"""The size whose results are stored."""

QUICK = Size(
    base=Arm(
        Recipe(
            complete_journey().network,
            TpmConfig(dim=8, history_months=1, passes=1, in_batch=0.0, batch_size=8192),
            CpmConfig(days=2, near_negatives=1.0, catalogue_negatives=1),
            ActrConfig(days=6, calibration_days=3, fit=FitConfig(passes=1)),
        )
    ),
    split=Split(date(2017, 11, 1), date(2017, 11, 1), date(2017, 11, 1), 60),
    seeds=(0, 1),
    few_days=2,
    links=1,
    log_months=4,
    cycles=2,
    world=SyntheticConfig(users=200, items=150, first=date(2017, 7, 1), ad_requests=0.4),
)
"""A size that shows that an experiment runs, and nothing else."""


def tiers(size: Size) -> Experiment:
    """Claim 1, and the reference lines."""
    base, cells = size.base, []
    short = replace(base, features=SHORT, history_days=30)
    for memory, arm in {"": base, ", counts of 30": short}.items():
        for days in (base.recipe.actr.days, size.few_days):
            few = arm.with_actr(days=days)
            arms = {
                "A-CTR alone": few.alone,
                "CPM + A-CTR": replace(few, tpm=False),
                "TPM + A-CTR": replace(few, start="random"),
                "TPM + CPM + A-CTR": few,
            }
            if few == base:
                arms["alone, natural and ads mixed"] = replace(few.alone, mixes=True)
                arms |= {n: replace(few.alone, reference=n) for n in REFERENCES[:-1]}
                arms[TREES_AND_WINDOWS] = replace(few, reference=TREES_AND_WINDOWS)
            cells += _cells(size.split, f"{days} days{memory}", arms, "A-CTR alone")
    question = (
        "What do TPM and CPM add to the ads model, with a month of ads and with days of it, with a"
        " year of counts and histories and with 30 days of them? And how good are simpler models?"
    )
    return _experiment(
        "tiers", "A-CTR with and without TPM and CPM", question, "ads", cells, size.seeds
    )


def alignment(size: Size) -> Experiment:
    """How each month's vectors come to lie where those of the month before did."""
    free = size.base.with_tpm(min_cosine=-1.0, max_residual=9.0)
    arms = {name: free.with_tpm(alignment=name) for name in ("warm_start", "procrustes", "none")}
    arms["without TPM"] = replace(size.base, tpm=False)
    # A-CTR has learned with the windows before the refresh; from the first day on it sees another.
    week = replace(size.split, last=min(size.split.last, size.split.first + timedelta(days=6)))
    cells = _cells(week, "", arms, "warm_start")
    question = "What does a refresh of TPM do to the week after it, by how snapshots are aligned?"
    return _experiment("alignment", "Alignment of the snapshots", question, "", cells, size.seeds)


def convergence(size: Size) -> Experiment:
    """Claim 2."""
    cells = []
    for parts in (32, 16, 8, 4, 2, 1):
        once = replace(size.base.recipe.actr.fit, passes=1)
        arm = replace(size.base.with_actr(fit=once), requests_share=1 / parts)
        arms = {"random": replace(arm, start="random"), "CPM": arm}
        cells += _cells(size.split, f"1/{parts}" if parts > 1 else "all", arms, "random")
    question = "How good is A-CTR after how many of a month's ads, each seen once?"
    title = "CPM initialisation against a random one, by rows seen"
    return _experiment("convergence", title, question, "share of the ads seen", cells, size.seeds)


def embedding_size(size: Size) -> Experiment:
    """Claim 3."""
    arms = {str(dim): size.base.with_tpm(dim=dim) for dim in (4, 8, 16, 32, 64)}
    cells = [Cell("without TPM", "0", replace(size.base, tpm=False), size.split, baseline=True)]
    cells += [Cell("with TPM", x, arm, size.split) for x, arm in arms.items()]
    question = "How large must TPM's vectors be?"
    return _experiment("embedding-size", "TPM embedding size", question, "D", cells, size.seeds[:2])


def cpm_days(size: Size) -> Experiment:
    """Claim 4."""
    days = size.base.recipe.cpm.days
    lengths = {"2 weeks": days * 14 // 30, "1 month": days, "2 months": 2 * days}
    lengths["3 months"] = 3 * days
    cells = [Cell("random", "none", replace(size.base, start="random"), size.split, True)]
    cells += [
        Cell("CPM", x, size.base.with_cpm(days=max(n, 1)), size.split) for x, n in lengths.items()
    ]
    question = "How many days of natural data does CPM need?"
    return _experiment(
        "cpm-days", "CPM on two weeks to three months", question, "CPM on", cells, size.seeds[:2]
    )


def aggregator(size: Size) -> Experiment:
    """Claim 5."""
    wide = replace(size.base.with_tpm(history_months=3), snapshots=7)
    names = ("self_attention", "additive_attention", "mean", "max", "concatenation", "newest")
    arms = {f"3 months, {name}": wide.with_network(aggregator=name) for name in names}
    arms |= {f"{n} month(s), self_attention": wide.with_network(window_months=n) for n in (1, 2, 6)}
    cells = _cells(size.split, "", arms, "3 months, self_attention")
    question = "Does it matter how the months of a window are aggregated, and how many there are?"
    return _experiment(
        "aggregator", "Aggregator and length of the window", question, "", cells, size.seeds[:2]
    )


def sparsity(size: Size) -> Experiment:
    """Claim 6."""
    cells = []
    for percent in (100, 30, 10, 3, 1):
        arm = replace(size.base, requests_share=percent / 100)
        arms = {"A-CTR alone": arm.alone, "full method": arm}
        cells += _cells(size.split, f"{percent} %", arms, "A-CTR alone")
    question = "How does the method's lift depend on how sparse ads are?"
    return _experiment(
        "sparsity", "Sparse ads", question, "requests with ads kept", cells, size.seeds
    )


def forgetting(size: Size) -> Experiment:
    """Claim 7."""
    cells = []
    days = (size.split.last - size.split.first).days // 2
    for month in months_until(f"{size.split.asof:%Y-%m}", size.cycles):
        asof = date.fromisoformat(f"{month}-01")
        split = Split(asof, asof, asof + timedelta(days=days), size.split.per_day)
        last = months_until(month, 2)[0]
        arm = replace(size.base.with_tpm(history_months=1), last_snapshot=last, snapshots=4)
        arms = {"without TPM": replace(arm, tpm=False), "with TPM": arm}
        cells += _cells(split, month, arms, "without TPM")
    question = (
        "Over six monthly cycles: does TPM help with users and items that the last month of ads"
        " did not have?"
    )
    made = _experiment(
        "forgetting", "Forgetting, cycle by cycle", question, "week from", cells, size.seeds[:2]
    )
    return replace(made, segments=True)


def domains(size: Size) -> Experiment:
    """Claim 8."""
    cells = []
    for correlation in (1.0, 0.75, 0.5, 0.25, 0.0, -0.5):
        world = replace(size.world, correlation=correlation)
        arms = {
            "A-CTR alone": size.base.alone,
            "CPM + A-CTR": replace(size.base, tpm=False),
            "TPM + CPM + A-CTR": size.base,
        }
        split = replace(size.split, per_day=None)
        made = _cells(split, f"{correlation:g}", arms, "A-CTR alone")
        cells += [replace(cell, world=world) for cell in made]
    question = "Where does it begin to hurt that natural content and ads are not alike?"
    title = "Domains more and less alike (synthetic)"
    return _experiment("domains", title, question, "correlation", cells, size.seeds)


def cost(size: Size) -> Experiment:
    """Claim 9."""
    arms = {
        "all pre-trained that day": size.base,
        "CPM three days old": replace(size.base, cpm_age_days=3),
        "CPM six days old": replace(size.base, cpm_age_days=6),
    }
    cells = _cells(size.split, "", arms, "all pre-trained that day")
    question = "What does it save that each tier has its own pace, and what does that cost?"
    made = _experiment("cost", "The price of freshness", question, "", cells, size.seeds)
    return replace(made, costs=True)


def continuity(size: Size) -> Experiment:
    """Claim 10."""
    long = replace(size.base.with_tpm(history_months=1), snapshots=size.log_months)
    restarted, alone = replace(long, links=0), long.alone
    once = replace(long.with_actr(fit=replace(long.recipe.actr.fit, passes=1)), links=size.links)
    arms = {
        "restarted from CPM": restarted,
        "the same, CPM's statistics kept": replace(restarted, keeps_statistics=True),
        "CPM continues from A-CTR": once,
        "continued from A-CTR": replace(once, start="continued"),
        "mean of CPM and continued": replace(once, start="mixed"),
        "alone, restarted": alone,
        "alone, continued": replace(once, start="ads only", tpm=False),
    }
    cells = _cells(size.split, "", arms, "restarted from CPM")
    question = (
        "Should A-CTR restart from CPM, continue from an earlier A-CTR, or start from the mean of"
        " both? Should normalisation statistics be carried over? And should CPM itself start from"
        " nothing, or from what an earlier A-CTR knew?"
    )
    return _experiment(
        "continuity", "Restart, continue, or both", question, "", cells, size.seeds[:2]
    )


def degraded(size: Size) -> Experiment:
    """Claim 11."""
    arms = {
        "all windows there": size.base,
        "user window away": replace(size.base, hides=("user",)),
        "item windows away": replace(size.base, hides=("item",)),
        "both away": replace(size.base, hides=("user", "item")),
        "trained without TPM": replace(size.base, tpm=False),
    }
    cells = _cells(size.split, "", arms, "all windows there")
    question = "How good are scores when the embeddings store is away?"
    return _experiment("degraded", "A degraded answer", question, "", cells, size.seeds)


def counts(size: Size) -> Experiment:
    """Claim 12."""
    kinds = {
        "7 and 30 days": replace(size.base, features=SHORT, history_days=30),
        "also the whole year": size.base,
    }
    cells = []
    for x, arm in kinds.items():
        arms = {"without TPM": replace(arm, tpm=False), "with TPM": arm}
        cells += _cells(size.split, x, arms, "without TPM")
    question = (
        "How much of a year of exact counts and histories does TPM stand in for, where only 30"
        " days of them are kept?"
    )
    return _experiment(
        "counts", "Long-term counts and TPM", question, "counts, histories", cells, size.seeds
    )


def precision(size: Size) -> Experiment:
    """What the store may round."""
    arms: dict[str, Arm] = {name: replace(size.base, precision=name) for name in PRECISIONS}
    cells = _cells(size.split, "", arms, "float32")
    question = "What does it cost to store vectors of windows in fewer bytes?"
    return _experiment("precision", "Bytes of a vector", question, "", cells, size.seeds)


EXPERIMENTS: dict[str, Callable[[Size], Experiment]] = {
    "tiers": tiers,
    "alignment": alignment,
    "convergence": convergence,
    "embedding-size": embedding_size,
    "cpm-days": cpm_days,
    "aggregator": aggregator,
    "sparsity": sparsity,
    "forgetting": forgetting,
    "domains": domains,
    "cost": cost,
    "continuity": continuity,
    "degraded": degraded,
    "counts": counts,
    "precision": precision,
}


def _experiment(
    name: str, title: str, question: str, x: str, cells: Sequence[Cell], seeds: tuple[int, ...]
) -> Experiment:
    return Experiment(name, title, question, x, tuple(cells), seeds)


def _cells(split: Split, x: str, arms: dict[str, Arm], baseline: str) -> list[Cell]:
    return [Cell(name, x, arm, split, name == baseline) for name, arm in arms.items()]
