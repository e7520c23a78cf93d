"""The verb `loadtest`. Imports are where they are needed, so that the command line starts fast."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TypeAlias

    from loadtest.bodies import Body
    from loadtest.client import Target
    from loadtest.disturbance import Disturbance
    from loadtest.report import Report
    from loadtest.run import Phase, Runner
    from loadtest.search import SearchReport

    Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

NOT_HELD = 3
"""Exit code where a stated limit was not held."""
INTERRUPTED = 130
KINDS = ("warmup", "steady", "swap", "frozen", "overload")
_TEXT = "put the service under load, and measure it from when requests were due"


def add_parser(verbs: Verbs) -> None:
    """Adds the verb, with `run` as what it does."""
    add_options(verbs.add_parser("loadtest", help=_TEXT, description=_TEXT))


def add_options(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(run=run)
    _add_what(verb)
    _add_how_much(verb)
    _add_disturbances(verb)
    _add_limits(verb)


def _add_what(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--url", default="http://127.0.0.1:8000", help="(default: %(default)s)")
    verb.add_argument("--allow-remote", action="store_true", help="also to another machine")
    source = verb.add_mutually_exclusive_group()
    source.add_argument("--requests", type=Path, metavar="FILE", help="JSON bodies, one a line")
    source.add_argument("--bundle", type=Path, metavar="DIR", help="its golden requests are sent")
    _number(verb, "--candidates", None, "cut or repeat each request's to so many", int)
    _number(verb, "--seed", 0, "of the arrivals, and of which request is sent when", int)
    verb.add_argument("--out", type=Path, metavar="FILE.json", help="the whole result")
    verb.add_argument("--picture", type=Path, metavar="FILE", help="PNG or SVG")


def _add_how_much(verb: argparse.ArgumentParser) -> None:
    mode = verb.add_mutually_exclusive_group()
    _number(verb, "--rate", None, "requests a second, sent when they are due (default: 50)")
    _number(mode, "--clients", None, "clients that wait for each answer (closed loop)", int)
    mode.add_argument("--search", action="store_true", help="the highest rate within --slo-p99-ms")
    mode.add_argument(
        "--measure-overhead", action="store_true", help="of the generator, on a server of its own"
    )
    verb.add_argument(
        "--arrivals", choices=["poisson", "constant"], default="poisson", help="(%(default)s)"
    )
    _number(verb, "--seconds", 30.0, "length of the one phase where no --phase is given")
    verb.add_argument(
        "--phase",
        action="append",
        type=_phase,
        dest="phases",
        metavar="KIND:SECONDS",
        help=f"{', '.join(KINDS)}; any number, one after the other",
    )
    _number(verb, "--timeout-s", 5.0, "after which a request is given up")
    _number(verb, "--connections", 64, "opened before the first request", int)
    _number(verb, "--max-in-flight", 512, "requests under way at most", int)
    _number(verb, "--max-s", 3600.0, "after which all ends")


def _add_disturbances(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--swap-command",
        action="append",
        default=[],
        metavar="COMMAND",
        help="run during 'swap'; of several, one after the other",
    )
    _number(verb, "--swap-every-s", 5.0, "between two of them")
    _number(verb, "--freeze-pid", None, "process that is stopped during 'frozen'", int)
    _number(verb, "--freeze-after-s", 1.0, "from the start of the phase")
    _number(verb, "--freeze-s", 2.0, "for how long")
    _number(verb, "--overload-factor", 2.0, "times --rate during 'overload'")


def _add_limits(verb: argparse.ArgumentParser) -> None:
    _number(verb, "--slo-p99-ms", None, "limit of p99, failures counted as infinitely late")
    _number(verb, "--max-failures", None, "limit of failed requests in a phase", int)
    _number(verb, "--max-rate", 20000.0, "highest of --search")
    _number(verb, "--step-s", 10.0, "shortest step of --search")
    _number(verb, "--tolerance", 0.05, "of the rate that --search finds, as a share")


def _number(
    verb: argparse._ActionsContainer,
    name: str,
    default: float | None,
    text: str,
    kind: type[int] | type[float] = float,
) -> None:
    shown = "" if default is None else " (default: %(default)s)"
    verb.add_argument(name, type=kind, default=default, metavar="N", help=text + shown)


def _phase(text: str) -> tuple[str, float]:
    kind, _, seconds = text.partition(":")
    try:
        if kind in KINDS:
            return kind, float(seconds)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not like steady:30; kinds: {', '.join(KINDS)}")


def run(options: argparse.Namespace) -> None:
    """Runs the verb; exits with `NOT_HELD` or `INTERRUPTED`.

    Raises:
        ValueError, OSError: something that the user can mend, in one line.
    """
    if options.measure_overhead:
        _measure_overhead(options)
        return
    from loadtest import loop
    from loadtest.report import table

    report, interrupted = loop.run(_run(options))
    print(table(report.phases))
    if report.search:
        print(f"highest rate: {report.search.rate:.5g}/s, p99 {report.search.p99_ms} ms")
    _write(report, options)
    if interrupted:
        sys.exit(INTERRUPTED)
    _judge(report)


def _write(report: Report, options: argparse.Namespace) -> None:
    if options.out:
        report.write(options.out)
    if options.picture:
        from loadtest.picture import draw

        draw(report, options.picture)


def _judge(report: Report) -> None:
    failed = {kind: n for phase in report.phases for kind, n in phase.failed.items()}
    if not any(phase.ok for phase in report.phases):
        raise ValueError(f"no request to {report.target} was answered with scores: {failed}")
    if broken := report.broken():
        print("not held:", *broken, sep="\n  ", file=sys.stderr)
        sys.exit(NOT_HELD)


async def _run(options: argparse.Namespace) -> tuple[Report, bool]:
    """The report, and whether a signal ended the run."""
    from loadtest.bodies import encode
    from loadtest.progress import watch
    from loadtest.report import Limits, Report
    from loadtest.run import Runner, stopping_on_signals

    target, host, path = _target(options)
    bodies = _bodies(options)
    runner = Runner(target, encode(bodies, host, path), options.seed, watch)
    phases = [] if options.search else _phases(options)
    if sum(phase.seconds for phase in phases) > options.max_s:
        raise ValueError(f"the phases take longer than --max-s {options.max_s:g}")
    with stopping_on_signals(runner.stop) as interrupted:
        asyncio.get_running_loop().call_later(options.max_s, runner.stop.set)
        search = await _search(options, runner)
        await runner.run(phases)
    sizes = sorted({len(body["candidates"]["id"]) for body in bodies})
    program = Path(sys.argv[0]).name.replace("__main__.py", "python -m loadtest")
    command = f"{program} {shlex.join(sys.argv[1:])}"
    source = str(options.requests or options.bundle)
    limits = Limits(None if options.search else options.slo_p99_ms, options.max_failures)
    reports = runner.reports
    made = Report(
        command, options.url, options.seed, source, sizes, reports, limits, search, runner.started
    )
    return made, interrupted.is_set()


async def _search(options: argparse.Namespace, runner: Runner) -> SearchReport | None:
    if not options.search:
        return None
    if not options.slo_p99_ms or not 0 < options.tolerance < 1:
        raise ValueError(
            f"--search with --slo-p99-ms {options.slo_p99_ms} and --tolerance {options.tolerance};"
            " the first must be above 0, the second between 0 and 1"
        )
    first = min(_rate(options), options.max_rate)
    return await runner.search(
        options.slo_p99_ms, first, options.max_rate, options.tolerance, options.step_s
    )


def _bodies(options: argparse.Namespace) -> list[Body]:
    from loadtest.bodies import bodies_of_bundle, read_bodies, resized

    if options.requests:
        bodies = read_bodies(options.requests)
    elif options.bundle:
        bodies = bodies_of_bundle(options.bundle)
    else:
        raise ValueError("nothing to send; give --requests FILE or --bundle DIR")
    return [resized(body, options.candidates) if options.candidates else body for body in bodies]


def _target(options: argparse.Namespace) -> tuple[Target, str, str]:
    """Whom to ask, and the Host header and path to ask with."""
    from loadtest.address import resolve
    from loadtest.client import Target

    address = resolve(options.url, allow_remote=options.allow_remote)
    for name in ("connections", "max_in_flight", "timeout_s", "max_s", "candidates"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0")
    target = Target(
        address.ip, address.port, options.timeout_s, options.connections, options.max_in_flight
    )
    return target, address.host, address.path


def _phases(options: argparse.Namespace) -> list[Phase]:
    planned = options.phases or [("steady", options.seconds)]
    names = [kind for kind, _ in planned]
    phases = []
    for i, (kind, seconds) in enumerate(planned):
        number = names[: i + 1].count(kind)
        name = f"{kind}-{number}" if names.count(kind) > 1 else kind
        phases.append(_phase_of(options, kind, name, seconds))
    return phases


def _phase_of(options: argparse.Namespace, kind: str, name: str, seconds: float) -> Phase:
    from loadtest.run import Phase

    if options.clients and options.rate:
        raise ValueError(f"--clients {options.clients} with --rate {options.rate:g}; give one")
    clients, rate = options.clients or 0, 0.0 if options.clients else _rate(options)
    if kind == "overload":
        if clients:
            raise ValueError("--phase overload takes --rate; in a closed loop there is no overload")
        rate *= options.overload_factor
    judged, disturbance = kind not in ("warmup", "overload"), _disturbance(options, kind)
    return Phase(name, seconds, rate, clients, options.arrivals, disturbance, judged)


def _rate(options: argparse.Namespace) -> float:
    return 50.0 if options.rate is None else float(options.rate)


def _disturbance(options: argparse.Namespace, kind: str) -> Disturbance | None:
    from loadtest.disturbance import Freeze, Swap

    if kind == "swap":
        return Swap(options.swap_command, options.swap_every_s)
    if kind == "frozen":
        if options.freeze_pid is None:
            raise ValueError("--phase frozen takes --freeze-pid, the process to stop")
        return Freeze(options.freeze_pid, options.freeze_after_s, options.freeze_s)
    return None


def _measure_overhead(options: argparse.Namespace) -> None:
    from loadtest.overhead import measure_overhead, table
    from loadtest.report import write_json

    bodies = _bodies(options) if options.requests or options.bundle else [_PLAIN]
    overhead = measure_overhead(bodies, options.candidates or 360, options.seconds)
    print(table(overhead))
    if options.out:
        write_json(options.out, overhead.document())


_PLAIN: Body = {
    "user": {"id": 1},
    "context": {},
    "candidates": {"id": list(range(10**6, 10**6 + 400))},
}
