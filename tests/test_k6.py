"""k6 itself is not here; its script is run by node, with a stand-in for k6's modules, against a
real service: so that it goes on asking what the service takes, and reading what it answers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from bundles import add_live_bundle, body, make_place, serving, settings_of

ROOT = Path(__file__).parent.parent
NODE = shutil.which("node")
MODULES = {
    "k6": 'export { check } from "./stand-in.js";',
    "k6/http": 'import { post } from "./stand-in.js"; export default { post };',
    "k6/data": "export class SharedArray { constructor(_, make) { return make(); } }",
    "k6/metrics": 'export { Metric as Counter, Metric as Rate } from "./stand-in.js";',
}
RUN = """
import { readFileSync } from "node:fs";
globalThis.__ENV = JSON.parse(process.argv[2]);
// As k6 does it: a path is seen from the script, not from where k6 was called.
globalThis.open = (path) => readFileSync(new URL(path, import.meta.url), "utf8");
const script = await import("./score.mjs");
for (let i = 0; i < 5; i++) script.default();
const { found } = await import("./node_modules/k6/stand-in.js");
console.log(JSON.stringify({ ...found, options: script.options }));
"""

pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


def run(folder: Path, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    modules = folder / "node_modules" / "k6"
    modules.mkdir(parents=True)
    files = {name: f"{name.replace('/', '-')}.js" for name in MODULES}
    exports = {f".{name.removeprefix('k6')}": f"./{files[name]}" for name in MODULES}
    exports["./stand-in.js"] = "./stand-in.js"
    package = {"name": "k6", "type": "module", "exports": exports}
    (modules / "package.json").write_text(json.dumps(package))
    for name, text in MODULES.items():
        (modules / files[name]).write_text(text)
    shutil.copy(Path(__file__).parent / "k6_stand_in.js", modules / "stand-in.js")
    shutil.copy(ROOT / "benchmarks" / "k6" / "score.js", folder / "score.mjs")
    (folder / "run.mjs").write_text(RUN)
    command = [str(NODE), str(folder / "run.mjs"), json.dumps(dict(environ))]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_sends_bodies_and_reads_scores_and_models(tmp_path: Path) -> None:
    place = make_place(tmp_path / "place")
    bundle_id = add_live_bundle(place)
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text("".join(f"{json.dumps(body(num))}\n" for num in (1, 3)))
    with serving(settings_of(place)) as client:
        url = str(client.base_url)
        done = run(tmp_path, {"BODIES": str(bodies), "URL": url, "RATE": "20", "SLO_P99_MS": "7"})
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["checks"] == [True] * 5
    assert said["metrics"]["degraded"] == [[False, None]] * 5
    assert said["metrics"]["answers_by_model"] == [[1, {"model": bundle_id}]] * 5
    assert said["options"]["scenarios"]["score"]["rate"] == 20
    assert said["options"]["thresholds"]["http_req_duration"] == ["p(99)<7"]


def test_what_is_refused_fails_the_scripts_check(tmp_path: Path) -> None:
    place = make_place(tmp_path / "place")
    add_live_bundle(place)
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text(json.dumps(body(2, context={"hour": "noon"})))
    with serving(settings_of(place)) as client:
        done = run(tmp_path, {"BODIES": str(bodies), "URL": str(client.base_url)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checks"] == [False] * 5


def test_without_bodies_the_script_says_what_it_needs(tmp_path: Path) -> None:
    done = run(tmp_path, {})
    assert done.returncode != 0
    assert "BODIES must be the absolute path" in done.stderr
