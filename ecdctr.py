"""The command line: one verb per job. Imports are inside the verbs, so that a machine that only
serves needs no training libraries and `--help` answers at once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TypeAlias

    from bundle.registry import Registry
    from embeddings_store import Store, WindowRef
    from training.actr import Variant
    from training.config import Schedule
    from training.workspace import Workspace

    _Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_OF_TRAINING = (
    "torch",
    "polars",
    "sklearn",
    "tqdm",
    "onnx",
    "httpx",
    "scipy",
    "matplotlib",
    "lightgbm",
)
REFUSED = 3
"""Exit code of an update whose bundle may not go live."""

# Idle OpenMP threads sleep instead of spinning: on a shared machine that is several times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb; an error that a user can mend is one line and exit code 1."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except ModuleNotFoundError as error:
        if error.name in _OF_TRAINING:
            sys.exit(f"ecdctr: {error.name} is not installed; run: pip install 'ecdctr[train]'")
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("ECDCTR_DEBUG") or not isinstance(error, _mendable()):
            raise
        first_line, _, _ = str(error).strip().partition("\n")
        sys.exit(f"ecdctr: {first_line}")


def _mendable() -> tuple[type[Exception], ...]:
    """Errors that a user can do something about. Those of a library that no verb has loaded can't
    have been raised, so nothing is imported here."""
    found: list[type[Exception]] = [ValueError, OSError]
    if store := sys.modules.get("embeddings_store"):
        found.append(store.StoreError)
    if polars := sys.modules.get("polars"):
        found.append(polars.exceptions.PolarsError)
    return tuple(found)


def _import(options: argparse.Namespace) -> None:
    from training.datasets.complete_journey import import_complete_journey, source_folder

    target = _workspace(options).data
    if target.exists() and not options.force:
        print(f"{target} is already there; --force imports it again")
        return
    summary = import_complete_journey(target, options.source or source_folder(), options.seed)
    print(
        f"{summary.natural_positives:,} natural positives, {summary.ad_positives:,} ads positives"
    )
    print(f"of {summary.ad_impressions:,} ads impressions, {summary.users:,} users in {target}")


def _train_tpm(options: argparse.Namespace) -> None:
    from training.recipes import complete_journey
    from training.tpm import train_through

    recipe = complete_journey()
    with _alone(options, "tpm") as workspace:
        months = train_through(workspace, options.through, options.months, recipe.tpm, options.seed)
    print(f"trained: {', '.join(months) or 'nothing, all snapshots are there'}")


def _train_cpm(options: argparse.Namespace) -> None:
    from training.cpm import train_cpm
    from training.recipes import complete_journey

    recipe, tpm = complete_journey(), not options.without_tpm
    with _alone(options, "cpm") as workspace:
        print(train_cpm(workspace, options.asof, recipe.network, recipe.cpm, options.seed, tpm))


def _train_actr(options: argparse.Namespace) -> None:
    from training.actr import train_actr
    from training.recipes import complete_journey

    recipe, variant = complete_journey(), _variant(options)
    with _alone(options, "actr") as workspace:
        print(
            train_actr(workspace, options.asof, recipe.network, recipe.actr, options.seed, variant)
        )


def _evaluate(options: argparse.Namespace) -> None:
    from training.evaluate import report, score_days, table
    from training.recipes import complete_journey

    workspace, variant = _workspace(options), _variant(options)
    variants = {variant.name(options.asof): variant}
    last, per_day = options.last or options.first, options.per_day or None
    network = complete_journey().network
    scored = score_days(workspace, options.asof, network, variants, options.first, last, per_day)
    entries = report(scored, None)
    if variant.tpm and variant.cpm:
        workspace.keep_evaluation(options.asof, entries)
    print(table(entries))
    if options.json:
        options.json.write_text(json.dumps(entries, indent=2))


def _publish(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    window = _workspace(options).pack(options.window)
    with (
        _opened_store(options) as store,
        tqdm(unit=" buckets", desc=f"publishing {window.ref}", disable=None) as bar,
    ):

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        ref = store.publish(window, progress=show)
    print(ref)


def _store_windows(options: argparse.Namespace) -> None:
    with _opened_store(options) as store:
        needed = _needed(options)
        for ref in store.windows():
            print(f"{ref}  {', '.join(needed.get(ref, [])) or 'no bundle needs it'}")
        for ref in store.unfinished():
            print(f"{ref}  unfinished: being published or removed, or broken off")


def _store_stats(options: argparse.Namespace) -> None:
    with _opened_store(options) as store:
        for ref in store.windows():
            found = store.stats(ref)
            entities = found.users + found.items
            print(
                f"{ref}  {found.users:,} users, {found.items:,} items, D = {found.dim},"
                f" {found.dtype}: {found.stored_bytes:,} bytes,"
                f" {found.stored_bytes / max(entities, 1):.1f} an entity"
            )


def _store_check(options: argparse.Namespace) -> None:
    with _opened_store(options) as store:
        present = store.windows()
        changed = []
        for ref in present:
            store.check(ref)
            again = _packed_again(options, ref, store.stats(ref).dtype)
            if again not in (None, ref):
                changed.append(f"{ref} (its snapshots give {again})")
            print(f"{ref}  whole{', equal to its snapshots' if again == ref else ''}")
        # Without a registry there is nothing to miss.
        needed = _needed(options) if _is_registry(_registry_name(options)) else {}
    missing = [f"{ref} of {', '.join(needed[ref])}" for ref in needed if ref not in present]
    if missing:
        sys.exit(f"ecdctr: not in the store: {'; '.join(missing)}")
    if changed:
        sys.exit(f"ecdctr: not what the snapshots give: {'; '.join(changed)}")


def _packed_again(options: argparse.Namespace, ref: WindowRef, dtype: str) -> WindowRef | None:
    """What the snapshots of a window's months give now, ids and vectors and all; None without."""
    from embeddings_store import ENTITIES, pack_window, read_snapshot, window_months
    from embeddings_store.precision import PRECISIONS

    months = window_months(ref.window)
    if any(not (options.workspace / "snapshots" / month).is_dir() for month in months):
        return None
    precision = next(known for known in PRECISIONS if known == dtype)
    snapshots = {m: {e: read_snapshot(options.workspace, e, m) for e in ENTITIES} for m in months}
    return pack_window(ref.window, snapshots, precision).ref


def _store_gc(options: argparse.Namespace) -> None:
    with _opened_store(options) as store:
        # First these: what is published after that is nobody's to remove.
        found = store.windows() + (store.unfinished() if options.unfinished else [])
        needed = _needed(options)
        for ref in sorted({ref for ref in found if ref not in needed}):
            if not options.dry_run:
                store.remove(ref)
            print(f"{ref}  {'would be removed' if options.dry_run else 'removed'}")


@contextmanager
def _opened_store(options: argparse.Namespace) -> Iterator[Store]:
    from embeddings_store import open_store

    store = open_store(_store_url(options), max_mbps=getattr(options, "max_mbps", None))
    try:
        yield store
    finally:
        store.close()


def _store_url(options: argparse.Namespace) -> str:
    return options.store or os.environ.get("ECDCTR_STORE") or str(options.workspace / "store")


def _needed(options: argparse.Namespace) -> dict[WindowRef, list[str]]:
    """The windows of bundles that are served or may be, with the ids of those bundles."""
    from embeddings_store import WindowRef

    needed: dict[WindowRef, list[str]] = {}
    for manifest in _registry(options).servable():
        ref = WindowRef(manifest.window.month, manifest.window.build)
        needed.setdefault(ref, []).append(manifest.id)
    return needed


def _export(options: argparse.Namespace) -> None:
    from training.export import export_actr
    from training.recipes import complete_journey

    with _alone(options, "actr") as workspace:
        workspace.registry = _registry(options)
        print(export_actr(workspace, options.asof, complete_journey()))


def _audit(options: argparse.Namespace) -> None:
    from training.audit import to_parquet

    print(f"{to_parquet(options.folder, options.target):,} requests added to {options.target}")


def _promote(options: argparse.Namespace) -> None:
    from bundle.registry import ROLES

    registry = _registry(options)
    for role in ROLES:
        if (share := getattr(options, f"{role}_share")) is not None:
            current = registry.start(role, options.id, share)
            print(f"current: {current.current}, {role}: {current.beside(role)}")
            return
    current = registry.promote(options.id)
    print(f"current: {current.current}, previous: {current.previous or 'none'}")


def _prune(options: argparse.Namespace) -> None:
    registry = _registry(options)
    for bundle_id in registry.prunable(options.keep):
        if not options.dry_run:
            registry.remove(bundle_id)
        print(f"{bundle_id}  {'would be removed' if options.dry_run else 'removed'}")
    for remnant in registry.remnants():
        if not options.dry_run:
            registry.sweep(remnant)
        print(f"{remnant}  broken off, {'would be removed' if options.dry_run else 'removed'}")


def _rollback(options: argparse.Namespace) -> None:
    current = _registry(options).rollback()
    print(f"current: {current.current}, previous: {current.previous or 'none'}")


def _stop(options: argparse.Namespace) -> None:
    current = _registry(options).stop(options.role)
    print(f"current: {current.current}, {options.role}: none")


def _serve(options: argparse.Namespace) -> None:
    from service.app import serve
    from service.settings import Settings

    registry, store = _registry_name(options), _store_url(options)
    if not _is_registry(registry):
        sys.exit(f"ecdctr: no registry at {registry}; run 'ecdctr demo' or 'ecdctr export' first")
    environ = {**os.environ, "ECDCTR_REGISTRY": registry, "ECDCTR_STORE": store}
    if "://" in registry and not environ.get("ECDCTR_REGISTRY_CACHE"):
        environ["ECDCTR_REGISTRY_CACHE"] = str(_registry_cache(options))
    serve(Settings.from_env(environ), options.host, options.port, options.workers)


def _score(options: argparse.Namespace) -> None:
    from bundle.golden import body_of
    from training.client import best_ads, score_over_http
    from training.examples import builder_for
    from training.requests import RequestMaker

    workspace = _workspace(options)
    log = workspace.log()
    builder = builder_for(workspace, log, options.day, options.day)
    rows = log.full_lists([options.day], options.nth)
    requests = [r for r, _ in RequestMaker(log, builder, options.day).requests(rows)]
    if len(requests) < options.nth:
        sys.exit(f"ecdctr: {options.day} has only {len(requests)} requests")
    request = requests[-1]
    if options.body:
        options.body.parent.mkdir(parents=True, exist_ok=True)
        options.body.write_text(json.dumps(body_of(request)))
        print(f"wrote {options.body}: {len(request.item_ids)} candidates")
        return
    answer = score_over_http(options.url, [request])
    print(f"user {request.user_id}, {len(request.item_ids)} candidates, {answer.last['model']}:")
    print(best_ads(log, request, answer.scores[0], 10))


def _update(options: argparse.Namespace) -> None:
    from embeddings_store import open_store
    from training.recipes import complete_journey
    from training.update import TIERS, run_update

    url = options.store or os.environ.get("ECDCTR_STORE")
    store = open_store(url, max_mbps=options.max_mbps) if url else None
    workspace = _workspace(options)
    workspace.registry = _registry(options)
    outcome = run_update(
        workspace,
        options.asof,
        complete_journey(),
        _schedule(options),
        options.seed,
        options.force,
        [options.only] if options.only else TIERS,
        options.allow_missing_days,
        store,
        options.wait_s,
        options.release,
    )
    print("\n".join(outcome.lines()))
    if outcome.refused:
        sys.exit(REFUSED)


def _simulate(options: argparse.Namespace) -> None:
    from experiments.replay import replay_page
    from training.recipes import complete_journey
    from training.simulate import run_simulation, summary

    out = options.out or options.workspace / "simulation.jsonl"
    lines = run_simulation(
        _workspace(options),
        options.first,
        options.last,
        complete_journey(),
        _schedule(options),
        out,
        options.per_day or None,
        options.seed,
        options.allow_missing_days,
        options.serve,
    )
    text, page = summary(lines, out), out.with_suffix(".html")
    command = (
        f"ecdctr simulate --from {options.first} --to {options.last} --per-day {options.per_day}"
        f" --allow-missing-days {options.allow_missing_days}"
    )
    page.write_text(replay_page(lines, text, command))
    print(f"{text}\n\n{page}")


def _experiment(options: argparse.Namespace) -> None:
    from experiments.catalogue import EXPERIMENTS, FULL, QUICK
    from experiments.report import markdown, page
    from experiments.run import run_experiment

    if options.name not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        raise ValueError(f"no experiment {options.name!r}; there are: {known}")
    workspace, size = _workspace(options), QUICK if options.quick else FULL
    command = f"ecdctr experiment {options.name}" + " --quick" * options.quick
    root = workspace.root / "experiments"
    experiment = EXPERIMENTS[options.name](size)
    workspace.log()
    result = run_experiment(experiment, size, workspace.data, root, command)
    target = root / "results" / f"{options.name}{'-quick' * options.quick}.json"
    result.write(target)
    target.with_suffix(".html").write_text(page([result]))
    print(markdown(result))
    print(f"\n{target}\n{target.with_suffix('.html')}")


def _demo(options: argparse.Namespace) -> None:
    from training.demo import run_demo
    from training.recipes import complete_journey

    run_demo(_workspace(options), complete_journey(), options.seed, options.store)


def _workspace(options: argparse.Namespace) -> Workspace:
    import torch

    from training.workspace import Workspace

    # With more, the same seed would no longer give the same model on any number of cores.
    torch.set_num_threads(1)
    return Workspace(options.workspace)


@contextmanager
def _alone(options: argparse.Namespace, tier: str) -> Iterator[Workspace]:
    """The workspace, while no other run makes anything of this tier."""
    workspace = _workspace(options)
    workspace.log()
    # The processes of one run that share the work are one run.
    if int(os.environ.get("RANK", "0")):
        yield workspace
        return
    with workspace.locked(tier):
        yield workspace


def _schedule(options: argparse.Namespace) -> Schedule:
    from training.config import Schedule

    if options.tpm_lag_days is None:
        return Schedule(tpm_lag_days=_workspace(options).lag_days)
    return Schedule(tpm_lag_days=options.tpm_lag_days)


def _registry_name(options: argparse.Namespace) -> str:
    given: str = options.registry or os.environ.get("ECDCTR_REGISTRY", "")
    return given or str(options.workspace / "registry")


def _is_registry(name: str) -> bool:
    """An object store has no folders that could be missing."""
    return "://" in name or Path(name).is_dir()


def _registry_cache(options: argparse.Namespace) -> Path:
    given = os.environ.get("ECDCTR_REGISTRY_CACHE")
    folder: Path = Path(given) if given else options.workspace / "registry-cache"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _registry(options: argparse.Namespace) -> Registry:
    from bundle.remote import open_registry

    name = _registry_name(options)
    return open_registry(name, _registry_cache(options) if "://" in name else None)


def _variant(options: argparse.Namespace) -> Variant:
    from training.actr import Variant

    return Variant(tpm=not options.without_tpm, cpm=not options.without_cpm)


def parser() -> argparse.ArgumentParser:
    """All verbs with their options."""
    parser = argparse.ArgumentParser("ecdctr", description="Cross-domain CTR: train, serve, score.")
    parser.add_argument(
        "--workspace",
        type=Path,
        default=Path(os.environ.get("ECDCTR_WORKSPACE", "build/workspace")),
        help="folder of data, models, windows and bundles (default: %(default)s)",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_training(verbs)
    _add_serving(verbs)
    return parser


def _add_training(verbs: _Verbs) -> None:
    verb = _verb(verbs, "import", "bring Complete Journey into the event log", _import)
    verb.add_argument("--source", type=Path, help="folder of Parquet files (default: installed)")
    verb.add_argument("--force", action="store_true", help="import again over what is there")
    _seed(verb)
    tiers = verbs.add_parser("train", help="train one tier").add_subparsers(
        required=True, metavar="TIER"
    )
    verb = _verb(tiers, "tpm", "monthly snapshots, each continued from the last", _train_tpm)
    verb.add_argument("--through", type=_month, required=True, metavar="YYYY-MM", help="last month")
    verb.add_argument(
        "--months", type=int, default=4, help="number of snapshots (default: %(default)s)"
    )
    _seed(verb)
    verb = _verb(tiers, "cpm", "the complete network on natural data", _train_cpm)
    _asof(verb)
    verb.add_argument("--without-tpm", action="store_true", help="for comparison")
    _seed(verb)
    verb = _verb(tiers, "actr", "the ads model, from CPM, calibrated", _train_actr)
    _asof(verb)
    _variants(verb)
    _seed(verb)
    verb = _verb(verbs, "evaluate", "metrics of a trained A-CTR on later days", _evaluate)
    _asof(verb)
    _variants(verb)
    verb.add_argument("--from", dest="first", type=_day, required=True, metavar="YYYY-MM-DD")
    verb.add_argument(
        "--to", dest="last", type=_day, metavar="YYYY-MM-DD", help="(default: one day)"
    )
    verb.add_argument(
        "--per-day", type=int, default=300, help="requests a day, 0 is all (default: %(default)s)"
    )
    verb.add_argument("--json", type=Path, help="also write the report here")
    verb = _verb(verbs, "export", "A-CTR to ONNX, checked, as a bundle in the registry", _export)
    _registry_option(verb)
    _asof(verb)
    verb = _verb(verbs, "audit", "requests that the service kept, as Parquet", _audit)
    verb.add_argument("folder", type=Path, help="ECDCTR_AUDIT_DIR of the service")
    verb.add_argument("target", type=Path, help="folder for the Parquet files")
    verb = _verb(verbs, "publish", "a window of three snapshots to the store", _publish)
    verb.add_argument(
        "--window", type=_month, required=True, metavar="YYYY-MM", help="its last month"
    )
    _store(verb)
    _max_mbps(verb)
    verb = _verb(verbs, "update", "train what is due, export, promote what passes", _update)
    _registry_option(verb)
    _asof(verb, datetime.now(UTC).date())
    verb.add_argument("--only", choices=["tpm", "cpm", "actr"], help="one tier (default: all)")
    verb.add_argument("--force", action="store_true", help="promote a refused bundle")
    verb.add_argument(
        "--release", type=_month, metavar="YYYY-MM", help="use a snapshot that is held back"
    )
    _missing_days(verb)
    verb.add_argument(
        "--wait-s", type=float, default=0.0, help="for another update to end (default: %(default)s)"
    )
    verb.add_argument(
        "--store", help="a URL or path that gets the window too (default: $ECDCTR_STORE)"
    )
    _max_mbps(verb)
    _lag(verb)
    _seed(verb)
    verb = _verb(verbs, "simulate", "replay history, an update and its scores a day", _simulate)
    verb.add_argument("--from", dest="first", type=_day, required=True, metavar="YYYY-MM-DD")
    verb.add_argument("--to", dest="last", type=_day, required=True, metavar="YYYY-MM-DD")
    verb.add_argument(
        "--per-day", type=int, default=300, help="requests a day, 0 is all (default: %(default)s)"
    )
    verb.add_argument("--serve", action="store_true", help="score some of each day over HTTP too")
    verb.add_argument(
        "--out", type=Path, help="a line of JSON a day (default: the workspace's simulation.jsonl)"
    )
    _missing_days(verb)
    _lag(verb)
    _seed(verb)
    verb = _verb(verbs, "experiment", "measure one of the method's claims", _experiment)
    verb.add_argument("name", help="which one, such as 'tiers'; a wrong name lists them all")
    verb.add_argument("--quick", action="store_true", help="a size that only shows that it runs")
    verb = _verb(verbs, "demo", "all of it, on real data, in one go", _demo)
    verb.add_argument(
        "--store",
        default="",
        help="serve from a Redis server: its URL, or 'redis' for one that is started for it",
    )
    _seed(verb)


def _add_serving(verbs: _Verbs) -> None:
    from loadtest.command import add_parser

    verb = _verb(verbs, "promote", "make a bundle the current one", _promote)
    verb.add_argument("id", help="the bundle's id, as 'export' printed it")
    _registry_option(verb)
    beside = verb.add_mutually_exclusive_group()
    beside.add_argument(
        "--canary-share", type=float, help="only for that share of users, beside the current one"
    )
    beside.add_argument(
        "--shadow-share", type=float, help="only to score again what that share was answered"
    )
    for role, text in (
        ("canary", "give all users back to the current bundle"),
        ("shadow", "score nothing a second time"),
    ):
        verb = _verb(verbs, f"stop-{role}", text, _stop)
        verb.set_defaults(role=role)
        _registry_option(verb)
    verb = _verb(verbs, "rollback", "make the previous bundle the current one", _rollback)
    _registry_option(verb)
    verb = _verb(verbs, "serve", "answer scoring requests over HTTP", _serve)
    verb.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    verb.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    verb.add_argument(
        "--workers", type=int, help="processes (default: one per core that the CPU quota leaves)"
    )
    _registry_option(verb)
    _store(verb)
    verb = _verb(verbs, "score", "score a real request of the data set over HTTP", _score)
    verb.add_argument("--day", type=_day, required=True, metavar="YYYY-MM-DD")
    verb.add_argument("--nth", type=int, default=1, help="which one (default: %(default)s)")
    verb.add_argument("--url", default="http://127.0.0.1:8000", help="(default: %(default)s)")
    verb.add_argument("--body", type=Path, help="write the request's JSON here and send nothing")

    verb = _verb(verbs, "prune", "remove old bundles that are not live and may not be", _prune)
    verb.add_argument(
        "--keep", type=_count, default=30, help="newest ones to keep (default: %(default)s)"
    )
    verb.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    _registry_option(verb)
    stores = verbs.add_parser("store", help="what is in the embeddings store").add_subparsers(
        required=True, metavar="WHAT"
    )
    for name, text, run in (
        ("windows", "list windows, and which bundles need them", _store_windows),
        ("stats", "list windows with what they hold and take", _store_stats),
        (
            "check",
            "verify checksums, and that nothing is missing that a bundle needs",
            _store_check,
        ),
        ("gc", "remove windows that no bundle needs which is live or may be", _store_gc),
    ):
        verb = _verb(stores, name, text, run)
        _registry_option(verb)
        _store(verb)
    verb.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    verb.add_argument(
        "--unfinished",
        action="store_true",
        help="also what was left half published; not while anybody publishes",
    )
    add_parser(verbs)


def _verb(verbs: _Verbs, name: str, text: str, run: object) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text, description=text)
    verb.set_defaults(run=run)
    return verb


def _asof(verb: argparse.ArgumentParser, default: date | None = None) -> None:
    text = "the day it is for: it learns from the days before"
    verb.add_argument(
        "--asof",
        type=_day,
        required=default is None,
        default=default,
        metavar="YYYY-MM-DD",
        help=text + (" (default: today in UTC)" if default else ""),
    )


def _variants(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--without-tpm", action="store_true", help="for comparison")
    verb.add_argument("--without-cpm", action="store_true", help="for comparison")


def _seed(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def _missing_days(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--allow-missing-days",
        type=int,
        default=0,
        metavar="N",
        help="days that the log may lack of what a tier learns from (default: %(default)s)",
    )


def _lag(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--tpm-lag-days",
        type=int,
        metavar="N",
        help="days between a month's end and the first rows that see its snapshot (default: 0, or"
        " what the workspace was begun with)",
    )


def _max_mbps(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--max-mbps", type=_above_zero, help="megabytes a second that a server is sent at most"
    )


def _store(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--store", help="a path or redis:// URL (default: the workspace's)")


def _registry_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--registry", help="folder or URL (default: the workspace's)")


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day like 2017-11-01") from None


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _month(text: str) -> str:
    try:
        return f"{date.fromisoformat(text + '-01'):%Y-%m}"
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a month like 2017-10") from None


if __name__ == "__main__":
    main()
