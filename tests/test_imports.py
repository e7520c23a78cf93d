"""Who may import whom, read from the source of every module and seen in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"bundle", "embeddings_store", "experiments", "loadtest", "service", "training", "ecdctr"}
MAY_IMPORT = {
    "bundle": {"bundle"},
    "embeddings_store": {"embeddings_store"},
    "service": {"service", "bundle", "embeddings_store"},
    "training": {"training", "bundle", "embeddings_store"},
    "experiments": {"experiments", "training", "bundle", "embeddings_store"},
    "loadtest": {"loadtest", "bundle"},
    "ecdctr": OURS,
}
"""Of ours, by package."""
TRAINING_ONLY = {"torch", "polars", "pyarrow", "sklearn", "onnx", "onnxscript", "tqdm", "httpx"}
TRAINING_ONLY |= {"matplotlib", "lightgbm"}
"""Libraries that come with the extra [train], which a machine that serves does not have."""
FOR_OBJECT_STORES = {"fsspec"}
"""Comes with the extras [s3] and [gs], and is imported only where a registry is a URL."""
FOR_LOAD = {"matplotlib", "tqdm", "httpx"}
"""Of these, what a load test shows its results with and compares its client to."""


def modules() -> list[Path]:
    folders = [path for package in sorted(OURS) for path in (ROOT / package).rglob("*.py")]
    return sorted([*folders, *ROOT.glob("ecdctr.py")])


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names that are imported anywhere in `tree`, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides who imports whom"
            yield str(node.module).split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in _BY_NAME and node.args:
            yield str(getattr(node.args[0], "value", "?")).split(".")[0]


_BY_NAME = {"__import__", "import_module", "importlib.import_module"}


def at_import_time(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: no functions, nothing that is for type checkers."""
    kept = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(kept, type_ignores=[])


def violations(package: str, source: str) -> set[str]:
    """What a module of `package` imports though it may not."""
    tree = ast.parse(source)
    if package == "ecdctr":  # its verbs import what they need when they run
        return set(imported(at_import_time(tree))) - sys.stdlib_module_names
    names = set(imported(tree))
    bad = (names & OURS) - MAY_IMPORT[package]
    if package not in ("training", "experiments"):
        bad |= names & (TRAINING_ONLY - FOR_LOAD if package == "loadtest" else TRAINING_ONLY)
    if package == "bundle":
        bad |= names - sys.stdlib_module_names - {"numpy", "bundle"} - FOR_OBJECT_STORES
    return bad


def loaded_by(module: str) -> set[str]:
    """Top-level packages in a fresh interpreter that has imported `module`."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-W", "error", "-c", code]
    return set(subprocess.check_output(command, cwd=ROOT, text=True).split())


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_imports_only_what_it_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert violations(package, path.read_text()) == set()


@pytest.mark.parametrize(
    ("package", "source", "caught"),
    [
        ("bundle", "import service.app", {"service"}),
        ("bundle", "from embeddings_store import Reader", {"embeddings_store"}),
        ("bundle", "import numpy as np, json, redis", {"redis"}),
        ("embeddings_store", "from bundle.ids import Keys", {"bundle"}),
        ("service", "from training.layers import Attention", {"training"}),
        ("service", "def load():\n    import torch.nn", {"torch"}),
        (
            "service",
            "try:\n    import polars\nexcept ImportError:\n    import pyarrow",
            {"polars", "pyarrow"},
        ),
        ("service", "import importlib\nimportlib.import_module('training.fit')", {"training"}),
        ("service", "__import__('torch')", {"torch"}),
        ("service", "if TYPE_CHECKING:\n    from ecdctr import main", {"ecdctr"}),
        ("training", "import torch\nfrom service.schemas import Body", {"service"}),
        ("training", "from experiments.arms import Arm", {"experiments"}),
        ("experiments", "import torch\nfrom service.schemas import Body", {"service"}),
        ("loadtest", "from service.schemas import Body", {"service"}),
        ("loadtest", "import httpx, tqdm, polars", {"polars"}),
        ("ecdctr", "import json, torch", {"torch"}),
        ("ecdctr", "if 1:\n    from training.fit import fit", {"training"}),
    ],
)
def test_a_planted_violation_is_caught(package: str, source: str, caught: set[str]) -> None:
    assert violations(package, source) == caught


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("bundle", "import numpy as np, json\nfrom bundle.ids import Keys"),
        ("embeddings_store", "import redis\nfrom embeddings_store.window import Reader"),
        ("service", "import onnxruntime\nfrom bundle.encode import Encoder"),
        ("training", "import torch, polars\nfrom embeddings_store import Store"),
        ("ecdctr", "import json\ndef verb():\n    from training.fit import fit"),
        ("ecdctr", "if TYPE_CHECKING:\n    from training.fit import Fit"),
    ],
)
def test_what_is_allowed_is_not_caught(package: str, source: str) -> None:
    assert violations(package, source) == set()


def test_there_is_something_to_check_in_every_package() -> None:
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in modules()} >= {
        "bundle",
        "embeddings_store",
        "service",
    }


def test_importing_the_service_loads_nothing_of_training() -> None:
    loaded = loaded_by("service.app")
    assert {"service", "bundle", "embeddings_store", "onnxruntime"} <= loaded
    assert loaded & (TRAINING_ONLY | {"training", "scipy"}) == set()


def test_importing_the_bundle_package_loads_none_of_the_others() -> None:
    loaded = loaded_by("bundle.artifact, bundle.registry")
    elsewhere = (OURS - {"bundle"}) | TRAINING_ONLY | {"onnxruntime", "redis", "pydantic"}
    assert loaded & elsewhere == set()


def test_the_command_line_starts_without_any_library() -> None:
    if not (ROOT / "ecdctr.py").exists():
        pytest.skip("there is no command line yet")
    assert loaded_by("ecdctr") & (OURS - {"ecdctr"} | TRAINING_ONLY | {"numpy"}) == set()
