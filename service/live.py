"""Which bundle is live: follows the registry, loads beside what is live, swaps between requests."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from bundle.registry import (
    ROLES,
    Beside,
    BundleError,
    Current,
    Registry,
    RegistryError,
    RegistryUnavailable,
    Role,
)
from embeddings_store.cache import CachedReader
from service.background import in_background
from service.errors import NotReadyError
from service.metrics import Metrics
from service.routing import is_chosen
from service.scorer import Scorer
from service.settings import Settings
from service.vetting import PASSING, RefusedError, load
from service.windows import WindowSource

log = logging.getLogger(__name__)

MAX_REFUSALS = 10
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""None where the C library is not glibc."""
_DRAIN_S = 30.0
"""Longest wait for requests that began on a replaced bundle; each is bounded by itself."""


@dataclass(frozen=True)
class Refusal:
    """Why a bundle did not go live; `bundle` is None when it is not known which one should."""

    bundle: str | None
    kind: str
    reason: str
    at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class _Sight:
    """What the registry shows: as long as it is equal, a refused bundle would be refused again."""

    current: Current | None
    error: str = ""
    files: tuple[tuple[str, str], ...] = ()
    """See `Registry.files`; nothing for the bundle that is live."""


class Live:
    """Owns the live scorer, and the task that replaces it. All methods are for the event loop."""

    def __init__(
        self, settings: Settings, registry: Registry, metrics: Metrics, source: WindowSource
    ) -> None:
        self._settings, self._registry = settings, registry
        self._metrics, self._source = metrics, source
        self._started_s = time.monotonic()
        self._scorer: Scorer | None = None
        self._tried: _Sight | None = None
        self._beside: dict[Role, tuple[Beside, Scorer]] = {}
        self._tried_beside: dict[Role, Beside] = {}
        self._retired: list[weakref.ref[object]] = []
        """Parts of bundles that were let go, as long as they are there."""
        self._task: asyncio.Task[None] | None = None
        self._refreshing = asyncio.Lock()
        self.since = ""
        """When the live bundle went live; UTC, ISO 8601."""
        self.refusals: deque[Refusal] = deque(maxlen=MAX_REFUSALS)
        """Newest first."""

    @property
    def scorer(self) -> Scorer | None:
        """The live scorer, to look at; score with `use`."""
        return self._scorer

    @contextmanager
    def use(self, user: str | int) -> Iterator[Scorer]:
        """The scorer for a user, the live one or the canary, which stays usable until the block
        ends, whatever goes live meanwhile.

        Raises:
            NotReadyError: no bundle is live; the text says why.
        """
        if self._scorer is None:
            raise NotReadyError(self.why_not_ready())
        with (self._chosen("canary", user) or self._scorer).in_use() as scorer:
            yield scorer

    @contextmanager
    def use_shadow(self, user: str | int) -> Iterator[Scorer | None]:
        """The shadow's scorer, if there is one and this user is in its share; usable like that of
        `use`."""
        shadow = self._chosen("shadow", user)
        with shadow.in_use() if shadow else nullcontext() as scorer:
            yield scorer

    def why_not_ready(self) -> str:
        """Empty when a bundle is live."""
        if self._scorer is not None:
            return ""
        if self.refusals:
            return f"the current bundle was refused: {self.refusals[0].reason}"
        return "no bundle has been promoted"

    async def start(self) -> None:
        """Tries the current bundle once, so that a process which accepts requests can answer them,
        then follows the registry until `stop`."""
        await self.refresh()
        self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        self._registry.close()
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        held = [self._scorer] if self._scorer else []
        held += [scorer for _, scorer in self._beside.values()]
        self._scorer = None
        self._beside.clear()
        for scorer in held:
            await self._source.let_go(scorer.reader)
            scorer.release()
        self._source.close()

    async def refresh(self) -> None:
        """Makes the registry's current bundle the live one, or notes why it can't be. Never raises
        for what is wrong with a bundle, the registry or the store."""
        async with self._refreshing:
            sight = await asyncio.to_thread(self._look, self._scorer.id if self._scorer else "")
            await self._refresh(sight)
            if not sight.error:
                for role in ROLES:
                    wanted = sight.current.beside(role) if sight.current else None
                    await self._follow_beside(role, wanted)

    async def vet(self, bundle_id: str) -> None:
        """Loads a bundle and lets it go again; nothing when it is live.

        Raises:
            RefusedError: it must not go live.
        """
        if self._scorer is None or self._scorer.id != bundle_id:
            await self._retire(await self._load(bundle_id))

    def _chosen(self, role: Role, user: str | int) -> Scorer | None:
        found = self._beside.get(role)
        if found and is_chosen(user, found[0].salt, found[0].share):
            return found[1]
        return None

    async def _follow_beside(self, role: Role, wanted: Beside | None) -> None:
        """Puts `wanted` beside the live bundle, which all users stay with where it is refused."""
        held = self._beside.get(role)
        if held and wanted and held[0].id == wanted.id:
            self._beside[role] = (wanted, held[1])
            return
        if held:
            del self._beside[role]
            self._metrics.beside(role, None, replaced=_labels(held[1]))
            await self._retire(held[1])
        if wanted is None or wanted == self._tried_beside.get(role):
            return
        self._tried_beside[role] = wanted
        scorer = await self._attempt(wanted.id)
        if isinstance(scorer, Scorer):
            self._beside[role] = (wanted, scorer)
            self._metrics.beside(role, _labels(scorer), replaced=None)
            log.info("bundle %s, window %s, is the %s", *_labels(scorer), role)
        elif scorer.kind in PASSING:
            del self._tried_beside[role]  # may pass by itself, so the next poll tries again

    async def _refresh(self, sight: _Sight) -> None:
        if sight == self._tried or self._is_live(sight):
            return
        self._tried = sight
        if sight.error:
            self._refuse(None, RefusedError("registry", sight.error))
        elif sight.current is not None:
            scorer = await self._attempt(sight.current.current)
            if isinstance(scorer, Scorer):
                if await self._is_wanted(scorer):
                    await self._swap(scorer)
                else:
                    self._tried = None
                    await self._retire(scorer)
            elif scorer.kind in PASSING:
                self._tried = None  # may pass by itself, so the next poll tries again

    async def _is_wanted(self, scorer: Scorer) -> bool:
        """Loading can take minutes where a bundle is fetched; somebody may have rolled back."""
        sight = await asyncio.to_thread(self._look, scorer.id)
        return sight.current is None or sight.current.current == scorer.id

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_s)
            if self._scorer and isinstance(self._scorer.reader, CachedReader):
                self._metrics.cached(self._scorer.reader)
            try:
                await self.refresh()
            except Exception:
                log.exception("following the registry failed; trying again")

    def _look(self, live_id: str) -> _Sight:
        try:
            current = self._registry.current()
            if current is None:
                return _Sight(None)
        except RegistryError as error:
            return _Sight(None, str(error))
        if current.current == live_id:
            return _Sight(current)
        return _Sight(current, files=self._registry.files(current.current))

    def _is_live(self, sight: _Sight) -> bool:
        return bool(self._scorer and sight.current and sight.current.current == self._scorer.id)

    async def _attempt(self, bundle_id: str) -> Scorer | RefusedError:
        """The bundle, loaded; or why it was refused, which is noted."""
        try:
            return await self._load(bundle_id)
        except RefusedError as error:
            refused = error
        except Exception as error:
            log.exception("loading bundle %s failed", bundle_id)
            refused = RefusedError("internal", f"{type(error).__name__}: {error}")
        self._refuse(bundle_id, refused)
        return refused

    async def _load(self, bundle_id: str) -> Scorer:
        try:
            folder = await in_background(self._registry.path, bundle_id)
        except RegistryUnavailable as error:
            raise RefusedError("unavailable", str(error)) from error
        except RegistryError as error:
            raise RefusedError("registry", str(error)) from error
        except BundleError as error:
            raise RefusedError("bundle", str(error)) from error
        # What is live already is better than a new bundle without its windows.
        waited_s = time.monotonic() - self._started_s
        may_wait = self._scorer is None and waited_s >= self._settings.store_wait_s
        deadline_ms = self._settings.store_deadline_ms
        try:
            return await load(folder, self._source, deadline_ms, may_wait=may_wait)
        except RefusedError as error:
            if error.kind == "bundle" and await in_background(self._registry.renew, bundle_id):
                raise RefusedError("unavailable", f"{error}; it is fetched again") from error
            raise

    def _refuse(self, bundle_id: str | None, refused: RefusedError) -> None:
        self._metrics.refusals.labels(refused.kind).inc()
        refusal = Refusal(bundle_id, refused.kind, str(refused), _now())
        last = self.refusals[0] if self.refusals else None
        if last and (last.bundle, last.kind) == (refusal.bundle, refusal.kind):
            self.refusals[0] = refusal
        else:
            self.refusals.appendleft(refusal)
            log.error("bundle %s refused (%s): %s", bundle_id, refused.kind, refused)

    async def _swap(self, scorer: Scorer) -> None:
        old, self._scorer, self.since = self._scorer, scorer, _now()
        replaced = _labels(old) if old else None
        was_leaked = any(part() is not None for part in self._retired)
        self._metrics.live(*_labels(scorer), replaced=replaced)
        log.info("bundle %s is live, window %s", *_labels(scorer))
        if old is not None:
            await self._retire(old)
            del old
        # What is alive now stays alive until the next swap. Frozen, it is not walked through by
        # every full collection, which would stop all requests for a twentieth of a second. What was
        # frozen is looked at again only where something of a bundle that was retired by an earlier
        # swap is still there: some cycle holds it.
        if was_leaked:
            gc.unfreeze()
        gc.collect()
        gc.freeze()
        self._retired = [part for part in self._retired if part() is not None]

    async def _retire(self, scorer: Scorer) -> None:
        """Waits for the requests that began on it, then frees it, in a thread."""
        self._retired += [weakref.ref(part) for part in (scorer, scorer.artifact.encoder)]
        try:
            async with asyncio.timeout(_DRAIN_S):
                while scorer.in_flight:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            log.error("%d requests on bundle %s did not end", scorer.in_flight, scorer.id)
        finally:
            if await self._source.let_go(scorer.reader):
                self._retired.append(weakref.ref(scorer.reader))
        await in_background(_free, scorer)


def _free(scorer: Scorer) -> None:
    """Also gives the memory back to the system, which glibc else keeps for itself."""
    scorer.release()
    if _trim is not None:
        _trim(0)


def _labels(scorer: Scorer) -> tuple[str, str]:
    window = scorer.artifact.manifest.window
    return scorer.id, f"{window.month}-{window.build}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
