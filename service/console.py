"""The console: a page for whoever runs the service, and the little JSON that it needs beside the
API's own answers and the metrics. It keeps no state, so any worker can answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, Response

from bundle.golden import body_of
from bundle.manifest import BundleError, refusals
from bundle.registry import Current, Registry, RegistryError
from service.answers import json_answer
from service.background import answer_of
from service.errors import NotReadyError
from service.live import Live

MAX_BUNDLES = 30
"""The page shows that many, the newest; there is one a day."""
_FOLDER = Path(str(files("service"))) / "console"
# No script, style, font or request from anywhere but the service itself, and none inline.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_UNKNOWN: dict[str, Any] = {"promoted": None, "bundles": [], "num_bundles": None}
_HEADERS = {
    "content-security-policy": _POLICY,
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def install(app: FastAPI, console: Console) -> None:
    """Adds the page and what it reads under `/console`."""
    app.get("/console", include_in_schema=False)(console.page)
    app.get("/console/console.css", include_in_schema=False)(console.style)
    app.get("/console/console.js", include_in_schema=False)(console.script)
    app.get("/console/bundles", include_in_schema=False)(console.bundles)
    app.get("/console/sample", include_in_schema=False)(console.sample)


@dataclass(frozen=True)
class Console:
    """The handlers. `control`: whether this port takes promotions, so that the page offers them."""

    registry: Registry
    live: Live
    control: bool

    async def page(self) -> Response:
        return FileResponse(_FOLDER / "index.html", headers=_HEADERS)

    async def style(self) -> Response:
        return FileResponse(_FOLDER / "console.css", headers=_HEADERS)

    async def script(self) -> Response:
        return FileResponse(_FOLDER / "console.js", headers=_HEADERS)

    async def bundles(self) -> Response:
        """The newest bundles with their figures, what was promoted last, and whether to promote
        from here; `num_bundles` is null while the registry gives no answer."""
        return json_answer(
            {"control": self.control, **(await answer_of(self._in_registry) or _UNKNOWN)}
        )

    async def sample(self, nth: int = 0) -> Response:
        """The body of the `nth` golden request of the live bundle (they repeat), which it scores.

        Raises:
            NotReadyError: no bundle is live.
        """
        if self.live.scorer is None:
            raise NotReadyError(self.live.why_not_ready())
        golden = self.live.scorer.artifact.golden
        return json_answer(
            {"request": body_of(golden[nth % len(golden)].request), "num": len(golden)}
        )

    def _in_registry(self) -> dict[str, Any]:
        ids, current = self.registry.ids(), self._current()
        newest = ids[-MAX_BUNDLES:][::-1]
        return {
            "promoted": asdict(current) if current else None,
            "bundles": [self._bundle(bundle_id) for bundle_id in newest],
            "num_bundles": len(ids),
        }

    def _current(self) -> Current | None:
        try:
            return self.registry.current()
        except RegistryError:
            return None  # among the refusals, with the reason

    def _bundle(self, bundle_id: str) -> dict[str, Any]:
        try:
            manifest = self.registry.read(bundle_id)
        except (BundleError, RegistryError) as error:
            return {"id": bundle_id, "asof": "", "metrics": {}, "refused": [str(error)]}
        return {
            "id": bundle_id,
            "asof": manifest.asof,
            "metrics": manifest.metrics,
            "refused": refusals(manifest),
        }
