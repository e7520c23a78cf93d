"""Where bundles live: `bundles/ID/` and one `current.json`, the only thing that ever changes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from bundle.manifest import BundleError, Manifest, read_manifest, refusals, verify

REMNANT_S = 24 * 3600.0
"""Longer than anything takes to publish or to remove a bundle."""
_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,99}")


class RegistryError(ValueError):
    """The registry can't do what was asked; the message says what would be right."""


class RegistryUnavailable(RegistryError):
    """It gave no answer, or has no room for now: worth another try."""


Role = Literal["canary", "shadow"]
"""A canary answers its share of the users; a shadow scores again what its share was answered."""
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Beside:
    """A bundle beside the current one, for a share of the users, 0 .. 1."""

    id: str
    share: float
    salt: str
    """Which users these are; of its own for each bundle, and kept when its share changes."""


@dataclass(frozen=True)
class Current:
    """Which bundle is live, and which one was before it."""

    current: str
    previous: str | None
    changed_at: str
    """UTC, ISO 8601."""
    canary: Beside | None = None
    shadow: Beside | None = None

    def beside(self, role: Role) -> Beside | None:
        """The bundle in that role."""
        return self.canary if role == "canary" else self.shadow

    @property
    def named(self) -> frozenset[str]:
        """Ids of all bundles that are live, may be by a rollback, or are beside the live one."""
        beside = [one.id for role in ROLES if (one := self.beside(role))]
        return frozenset([self.current, *beside, *([self.previous] if self.previous else [])])


class Registry:
    """A directory of bundles with one of them promoted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)
        """For messages."""

    def path(self, bundle_id: str) -> Path:
        """Where the bundle of that id is.

        Raises:
            RegistryError: the id is malformed or not here.
        """
        folder = self.root / "bundles" / bundle_id
        if not self.is_id(bundle_id) or not folder.is_dir():
            raise self.unknown(bundle_id)
        return folder

    def unknown(self, bundle_id: str) -> RegistryError:
        """What to say of an id that is malformed or not here."""
        known = ", ".join(self.ids()) or "none; run 'ecdctr export' first"
        return RegistryError(f"no bundle {bundle_id!r} in {self.name}; there are: {known}")

    @staticmethod
    def is_id(text: str) -> bool:
        """Whether it could be the id of a bundle, and so the name of a folder."""
        return _ID.fullmatch(text) is not None

    def ids(self) -> list[str]:
        """Ids of all complete bundles, sorted."""
        folders = (self.root / "bundles").glob("*/manifest.json")
        return sorted(path.parent.name for path in folders if self.is_id(path.parent.name))

    def read(self, bundle_id: str) -> Manifest:
        return read_manifest(self.path(bundle_id))

    def files(self, bundle_id: str) -> tuple[tuple[str, str], ...]:
        """Each file of a bundle with something that changes when it does; nothing when there is no
        such bundle."""
        try:
            folder = self.path(bundle_id)
            found = sorted((path, path.lstat()) for path in folder.rglob("*"))
        except (RegistryError, OSError):
            return ()
        return tuple((str(path), f"{stat.st_size} {stat.st_mtime_ns}") for path, stat in found)

    def servable(self) -> list[Manifest]:
        """Bundles that are live or may be, sorted: the current one, the one before it, those beside
        it, and those that were not refused and are for the current one's day or later.

        Raises:
            RegistryError: nothing has been promoted, so nothing is known of that.
        """
        current = self.current()
        if current is None:
            raise RegistryError(
                f"{self.name}: no bundle has been promoted; is it the right registry?"
            )
        live = self.read(current.current)
        return [
            manifest
            for manifest in map(self.read, self.ids())
            if manifest.id in current.named
            or (manifest.asof >= live.asof and not refusals(manifest))
        ]

    def prunable(self, keep: int) -> list[str]:
        """Bundles that nothing needs, oldest first: not `servable`, nor among the newest `keep`.

        Raises:
            RegistryError: nothing has been promoted.
        """
        needed = {manifest.id for manifest in self.servable()}
        oldest_first = sorted(map(self.read, self.ids()), key=lambda m: (m.asof, m.created))
        return [m.id for m in oldest_first[: -keep or None] if m.id not in needed]

    def remnants(self) -> list[str]:
        """What broke off on its way in or out a day ago or earlier, sorted: nothing lists it, and
        nothing will need it."""
        found = [path for kind in (".draft-*", ".removed-*") for path in self.root.glob(kind)]
        return sorted(path.name for path in found if is_old(_changed_s(path)))

    def sweep(self, remnant: str) -> None:
        """Deletes one of `remnants`.

        Raises:
            RegistryError: something of it is left.
        """
        shutil.rmtree(self.root / remnant, ignore_errors=True)
        _check_gone(self.root / remnant)

    def close(self) -> None:
        """Whatever is under way ends soon, in an error."""

    def renew(self, bundle_id: str) -> bool:
        """For who finds that a bundle is damaged: whether `path` will now give it anew."""
        return False

    def remove(self, bundle_id: str) -> None:
        """Takes a bundle away in one step, then deletes it; who has it open keeps its pages.

        Raises:
            RegistryError: no such bundle; or something of it is left, though no longer as one.
        """
        _check_gone(self._delete(self.path(bundle_id)))

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """A temporary folder on the registry's own file system, gone when the block ends."""
        folder = self.root / f".draft-{os.getpid()}-{os.urandom(4).hex()}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, draft: Path) -> str:
        """Moves a sealed draft into place, in one step; the same bundle twice is fine.

        Raises:
            BundleError: the draft does not match its own manifest.
        """
        manifest = verify(draft)
        if not self.is_id(manifest.id):
            raise BundleError(f"{draft.name}: {manifest.id!r} can't be the id of a bundle")
        for path in [draft, *draft.rglob("*")]:
            sync(path)
        target = self.root / "bundles" / manifest.id
        target.parent.mkdir(exist_ok=True)
        sync(self.root)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            verify(target)
        sync(target.parent)
        return manifest.id

    def current(self) -> Current | None:
        """What is promoted; None before the first promotion.

        Raises:
            RegistryError: `current.json` is there but can't be read.
        """
        path = self.root / "current.json"
        try:
            return parse_current(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise RegistryError(f"{path}: unreadable: {error}; promote a bundle again") from error

    def promote(self, bundle_id: str) -> Current:
        """Makes a bundle the current one, after verifying it; promoting it twice changes nothing.

        Raises:
            RegistryError: no such bundle, or its gates refused it.
            BundleError: the bundle is damaged.
        """
        self._verify(bundle_id)
        self._check_gates(bundle_id)
        with self._locked():
            before = self._current_or_none()
            if before and before.current == bundle_id:
                return before
            if before is None:
                return self._write(Current(bundle_id, None, ""))
            return self._write(replace(before, current=bundle_id, previous=before.current))

    def start(self, role: Role, bundle_id: str, share: float) -> Current:
        """Puts a bundle beside the current one for a share of the users, after verifying it; for
        the bundle that is there already it changes the share. It ends with `stop`, or when the
        bundle is promoted.

        Raises:
            RegistryError: no such bundle, its gates refused it, it is the current one, nothing is
                promoted, or the share is not above 0 and at most 1.
            BundleError: the bundle is damaged.
        """
        if not 0 < share <= 1:
            raise RegistryError(f"a {role}'s share is {share}; it must be above 0 and at most 1")
        self._verify(bundle_id)
        self._check_gates(bundle_id)
        with self._locked():
            before = self.current()
            if before is None or before.current == bundle_id:
                raise RegistryError(f"{bundle_id} can't be a {role} beside {before}")
            known = before.beside(role)
            salt = known.salt if known and known.id == bundle_id else os.urandom(8).hex()
            return self._write(_with(before, role, Beside(bundle_id, share, salt)))

    def stop(self, role: Role) -> Current:
        """All users are the current bundle's alone again.

        Raises:
            RegistryError: there is no bundle in that role.
        """
        with self._locked():
            before = self.current()
            if before is None or before.beside(role) is None:
                raise RegistryError(f"{self.name}: there is no {role} to stop")
            return self._write(_with(before, role, None))

    def rollback(self) -> Current:
        """Makes the previous bundle the current one; a second call goes forward again.

        Raises:
            RegistryError: there is no previous bundle.
        """
        with self._locked():
            before = self.current()
            if before is None or before.previous is None:
                raise RegistryError(f"{self.name}: no previous bundle to roll back to")
            self._verify(before.previous)
            return self._write(replace(before, current=before.previous, previous=before.current))

    def _delete(self, folder: Path) -> Path:
        """Takes a folder away in one step, then deletes as much of it as can be; gives its last
        name."""
        hidden = self.root / f".removed-{folder.name}"
        shutil.rmtree(hidden, ignore_errors=True)  # of a removal that broke off
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
        return hidden

    def _check_gates(self, bundle_id: str) -> None:
        if reasons := refusals(self.read(bundle_id)):
            raise RegistryError(f"{bundle_id} was refused: {'; '.join(reasons)}")

    def _verify(self, bundle_id: str) -> None:
        found = verify(self.path(bundle_id)).id
        if found != bundle_id:
            raise BundleError(f"{self.path(bundle_id)}: is the bundle {found!r}")

    def _current_or_none(self) -> Current | None:
        try:
            return self.current()
        except RegistryUnavailable:
            raise
        except RegistryError:
            return None

    def _write(self, wanted: Current) -> Current:
        changed = replace(wanted, changed_at=datetime.now(UTC).isoformat(timespec="seconds"))
        for role in ROLES:
            beside = changed.beside(role)
            if beside and beside.id == changed.current:
                changed = _with(changed, role, None)
        document = asdict(changed)
        for role in ROLES:
            if document[role] is None:
                del document[role]  # which releases before it was known refuse to read
        self._replace_current(json.dumps(document, indent=2))
        return changed

    def _replace_current(self, content: str) -> None:
        temporary = self.root / f".current-{os.getpid()}.json"
        temporary.write_text(content)
        sync(temporary)
        os.replace(temporary, self.root / "current.json")
        sync(self.root)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def parse_current(document: Any) -> Current:
    """What `current.json` says.

    Raises:
        ValueError, TypeError: it is not such a document.
    """
    if not isinstance(document, dict):
        raise TypeError(f"{document!r} is not an object")
    canary, shadow = (Beside(**named) if (named := document.pop(r, None)) else None for r in ROLES)
    found = Current(**document, canary=canary, shadow=shadow)
    beside = {role: one for role in ROLES if (one := found.beside(role))}
    for role, one in beside.items():
        if not 0 < one.share <= 1:
            raise ValueError(f"{one.share!r} is not the share of a {role}")
    for name in (found.current, found.previous or "", *(one.id for one in beside.values())):
        if not isinstance(name, str):
            raise TypeError(f"{name!r} is not the id of a bundle")
    return found


def _with(current: Current, role: Role, beside: Beside | None) -> Current:
    if role == "canary":
        return replace(current, canary=beside)
    return replace(current, shadow=beside)


def _check_gone(folder: Path) -> None:
    if folder.exists():
        raise RegistryError(
            f"{folder}: not all of it could be removed; check its owner and permissions"
        )


def _changed_s(folder: Path) -> float:
    """When it got its name, or something in it; infinity where it is gone."""
    try:
        facts = folder.stat()
    except OSError:
        return float("inf")
    return max(facts.st_mtime, facts.st_ctime)


def is_old(at_s: float) -> bool:
    """Whether what was last changed then, in seconds since 1970, is a remnant."""
    return at_s < time.time() - REMNANT_S


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = [
    "Beside",
    "BundleError",
    "Current",
    "Registry",
    "RegistryError",
    "RegistryUnavailable",
    "sync",
]
