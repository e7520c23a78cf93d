"""A registry in an object store (`s3://`, `gs://`, whatever fsspec knows), and a folder on this
machine for the bundles that are in use.

It is laid out as a folder is. An object store renames nothing, so a bundle counts once its manifest
is there, which is written last; and a bundle is opened from the folder, where it appears in one
step, whole and verified. What was fetched of it before is not fetched again.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from bundle.manifest import MANIFEST, BundleError, Manifest, read_manifest, verify
from bundle.registry import (
    Current,
    Registry,
    RegistryError,
    RegistryUnavailable,
    is_old,
    parse_current,
    sync,
)

POINTER = "current.json"
_CHUNK_BYTES = 16 * 1024 * 1024
_S3 = {"config_kwargs": {"connect_timeout": 3, "read_timeout": 5, "retries": {"max_attempts": 1}}}
_TRIES = 2
"""Of a question. It is asked again anyway, and meanwhile somebody waits."""
_LOOK_AGAIN_S = 0.2
_LISTED_S = 60.0
"""How long a list of all bundles is believed."""


def open_registry(where: str, cache: Path | None = None) -> Registry:
    """The registry at `where`: a folder, or a URL, which needs `cache`, a folder that nothing else
    uses. Processes of one machine may share it.

    Raises:
        RegistryError: there is no cache, or what such a URL needs is not installed.
    """
    if "://" not in where:
        return Registry(Path(where))
    if cache is None:
        raise RegistryError(f"registry {where}: a URL needs a folder for what is fetched from it")
    try:
        from fsspec.core import url_to_fs

        is_s3 = where.startswith("s3:")
        options = _S3 if is_s3 else {}
        files, prefix = url_to_fs(where.rstrip("/"), use_listings_cache=False, **options)
        if is_s3:
            files.retries = _TRIES
    except (ImportError, ValueError) as error:
        raise RegistryError(
            f"registry {where}: {error}; pip install 'ecdctr[s3]' is for s3://"
        ) from error
    return RemoteRegistry(where.rstrip("/"), files, prefix, cache)


class RemoteRegistry(Registry):
    """Implements all of `Registry`; its `root` is the folder on this machine.

    `current.json` is replaced only if it is as it was read, where the object store can do that (S3
    can); elsewhere, of two who promote at the same moment, the last one wins.
    """

    def __init__(self, url: str, files: Any, prefix: str, cache: Path) -> None:
        """files: a file system of fsspec, with `prefix` for what is `url` to people."""
        super().__init__(cache)
        self.name = url
        self._files, self._prefix = files, prefix
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._renewed: set[str] = set()
        self._listed: tuple[float, list[str]] = (-_LISTED_S, [])
        self._pointer: tuple[dict[str, Any] | None, bytes] = (None, b"")
        """What the object store said of `current.json` when it was last read, and what it held."""

    def path(self, bundle_id: str) -> Path:
        """Where the bundle is on this machine; it is fetched and verified first where it is not.

        Raises:
            RegistryUnavailable: it could not be fetched now; what was is kept for the next try.
            RegistryError: there is no such bundle.
            BundleError: what is in the object store is damaged.
        """
        folder = self._folder(bundle_id)
        if not folder.is_dir():
            try:
                # One process of this machine fetches, the others find what it fetched.
                with self._alone():
                    if not folder.is_dir():
                        self._fetch(bundle_id)
            except OSError as error:  # of this machine: no room, no permission
                raise RegistryUnavailable(f"{self.root}: {error}") from error
        return folder

    def ids(self) -> list[str]:
        """Ids of all complete bundles, sorted; from memory for a minute, and where the object store
        gives no answer."""
        listed_s, ids = self._listed
        if time.monotonic() - listed_s < _LISTED_S:
            return ids
        try:
            found = self._objects("bundles")
        except RegistryUnavailable:
            if not ids:
                raise
            self._listed = (time.monotonic(), ids)
            return ids
        end = f"/{MANIFEST}"
        folders = (name.removesuffix(end) for name in found if name.endswith(end))
        ids = sorted(filter(self.is_id, folders))
        self._listed = (time.monotonic(), ids)
        return ids

    def read(self, bundle_id: str) -> Manifest:
        """The manifest alone. It never changes, so it is fetched once."""
        folder = self._folder(bundle_id, "manifests")
        if not folder.is_dir():
            content = self._content(bundle_id)
            with self.draft() as draft:
                (draft / MANIFEST).write_bytes(content)
                if read_manifest(draft).id != bundle_id:
                    raise BundleError(f"{self.name}/bundles/{bundle_id}: is another bundle")
                folder.parent.mkdir(exist_ok=True)
                with suppress(OSError):  # another process was faster
                    draft.rename(folder)
        return read_manifest(folder)

    def files(self, bundle_id: str) -> tuple[tuple[str, str], ...]:
        try:
            found = self._objects("bundles", bundle_id)
        except RegistryError:
            return ()
        return tuple((name, repr(sorted(facts.items()))) for name, facts in sorted(found.items()))

    def publish(self, draft: Path) -> str:
        bundle_id = super().publish(draft)
        folder = self._folder(bundle_id)
        with self._reaching(f"bundles/{bundle_id}"):
            if self._files.exists(self._remote("bundles", bundle_id, MANIFEST)):
                return bundle_id
            for name in [*read_manifest(folder).files, MANIFEST]:
                self._files.put_file(str(folder / name), self._remote("bundles", bundle_id, name))
        self._listed = (-_LISTED_S, [])
        return bundle_id

    def remnants(self) -> list[str]:
        """Also those of object stores: folders of bundles without a manifest."""
        found = self._objects("bundles")
        newest: dict[str, float] = {}
        for name in found:
            folder, slash, _ = name.partition("/")
            if slash and self.is_id(folder) and f"{folder}/{MANIFEST}" not in found:
                newest[folder] = max(newest.get(folder, 0.0), self._modified_s(name))
        old = [f"bundles/{folder}" for folder, at_s in newest.items() if is_old(at_s)]
        return sorted([*super().remnants(), *old])

    def _modified_s(self, name: str) -> float:
        """When an object under `bundles/` was last changed, in seconds since 1970; infinity where
        it is gone, or nobody can say."""
        try:
            with self._reaching(f"bundles/{name}"):
                at: float = self._files.modified(self._remote("bundles", name)).timestamp()
                return at
        except (FileNotFoundError, RegistryUnavailable):
            return float("inf")

    def sweep(self, remnant: str) -> None:
        if not remnant.startswith("bundles/"):
            super().sweep(remnant)
            return
        with self._reaching(remnant):
            self._files.rm(self._remote(remnant), recursive=True)

    def close(self) -> None:
        self._closed.set()

    def renew(self, bundle_id: str) -> bool:
        """Removes the copy on this machine if it is not as it was when it was fetched. Of each
        bundle once: what is damaged again is not worth another try."""
        if bundle_id in self._renewed:
            return False
        self._renewed.add(bundle_id)
        folder = self._folder(bundle_id)
        # Another process, which has the same copy, may have removed or renewed it meanwhile.
        with suppress(OSError), self._alone():
            try:
                verify(folder)
            except BundleError:
                self._delete(folder)
        return True

    def remove(self, bundle_id: str) -> None:
        """Takes its manifest away, so that it counts no longer, then deletes it; from here too."""
        self.read(bundle_id)
        with self._reaching(f"bundles/{bundle_id}"):
            with suppress(FileNotFoundError):  # a removal that broke off
                self._files.rm_file(self._remote("bundles", bundle_id, MANIFEST))
            with suppress(FileNotFoundError):
                self._files.rm(self._remote("bundles", bundle_id), recursive=True)
        self._listed = (-_LISTED_S, [])
        for kind in ("bundles", "manifests"):
            if (folder := self._folder(bundle_id, kind)).is_dir():
                self._delete(folder)

    def current(self) -> Current | None:
        """What is promoted; read again only where the object store says that it has changed.

        Raises:
            RegistryUnavailable: the object store gave no answer.
            RegistryError: `current.json` is there but can't be read.
        """
        path = self._remote(POINTER)
        with self._lock, self._reaching(POINTER):
            try:
                facts = self._files.info(path)
                if facts != self._pointer[0]:
                    self._pointer = (facts, self._files.cat_file(path))
            except FileNotFoundError:
                self._pointer = (None, b"")
                return None
            content = self._pointer[1]
        try:
            return parse_current(json.loads(content))
        except (ValueError, TypeError) as error:
            text = f"{self.name}/{POINTER}: unreadable: {error}; promote a bundle again"
            raise RegistryError(text) from error

    def _replace_current(self, content: str) -> None:
        path, facts = self._remote(POINTER), self._pointer[0]
        options: dict[str, Any] = {}
        if "s3" in self._files.protocol:
            options = {"IfMatch": facts["ETag"]} if facts else {"mode": "create"}
        try:
            with self._reaching(POINTER):
                self._files.pipe_file(path, content.encode(), **options)
        except RegistryUnavailable as error:
            before = self._pointer[0]
            self.current()
            if self._pointer[1] == content.encode():
                return  # it was replaced, and only the answer was lost
            if self._pointer[0] == before:
                raise
            raise RegistryError(
                f"{self.name}/{POINTER} was changed by another at the same time, and is as they"
                " left it; look at it and try again"
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Between reading and replacing `current.json`, no other thread reads it again."""
        self.root.mkdir(parents=True, exist_ok=True)
        with self._lock:
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process of this machine fetches or removes a copy meanwhile."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            while not _lock_now(file):
                self._check_open()
                self._closed.wait(_LOOK_AGAIN_S)
            yield

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RegistryUnavailable(f"{self.name}: closed during a download")

    def _verify(self, bundle_id: str) -> None:
        """All of its files are there. Who serves it checks what is in them: a rollback must not
        wait until they are fetched."""
        self._sizes(bundle_id)

    def _sizes(self, bundle_id: str) -> dict[str, int]:
        """Bytes of each file of a bundle, all of which are there."""
        objects, sizes = self._objects("bundles", bundle_id), {}
        for name in [*self.read(bundle_id).files, MANIFEST]:
            self._check_inside(bundle_id, name)
            if name not in objects:
                raise BundleError(f"{self.name}/bundles/{bundle_id}/{name}: missing")
            sizes[name] = int(objects[name]["size"])
        return sizes

    def _fetch(self, bundle_id: str) -> None:
        self._make_room(bundle_id)
        partial, sizes = self.root / f".partial-{bundle_id}", self._sizes(bundle_id)
        pointer, was_begun = self._pointer[0], partial.is_dir()
        there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        self._check_room(sum(sizes.values()) - there)
        for name, size in sizes.items():
            with self._reaching(f"bundles/{bundle_id}/{name}"):
                remote = self._remote("bundles", bundle_id, name)
                self._fetch_file(remote, partial / name, size, pointer)
        self._finish(bundle_id, partial, was_begun)

    def _finish(self, bundle_id: str, partial: Path, was_begun: bool) -> None:
        """Verifies what was fetched, and puts it where `path` finds it."""
        try:
            verify(partial)
        except BundleError as error:
            shutil.rmtree(partial)  # or the next try would find the same
            if was_begun:  # of what may have been another content then
                raise RegistryUnavailable(f"{error}; it is fetched again from the start") from error
            raise
        for path in [partial, *partial.rglob("*")]:
            sync(path)
        folder = self._folder(bundle_id)
        folder.parent.mkdir(exist_ok=True)
        partial.rename(folder)
        sync(folder.parent)

    def _fetch_file(
        self, remote: str, target: Path, size: int, pointer: dict[str, Any] | None
    ) -> None:
        """Gives up where `current.json` has changed since `pointer`: perhaps somebody rolled back,
        which must not wait for this."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as file:
            while (start := file.tell()) < size:
                self._check_open()
                if start and self.current() is not None and self._pointer[0] != pointer:
                    raise RegistryUnavailable(f"{self.name}/{POINTER} has changed meanwhile")
                stop = min(start + _CHUNK_BYTES, size)
                content = self._files.cat_file(remote, start=start, end=stop)
                if len(content) != stop - start:
                    raise OSError(f"{len(content)} bytes instead of {stop - start}")
                file.write(content)

    def _make_room(self, bundle_id: str) -> None:
        """Removes what `current.json` does not name; who has it open keeps its pages."""
        current = self.current()
        needed = {bundle_id, *(current.named if current else ())}
        for folder in (self.root / "bundles").glob("*"):
            if folder.name not in needed:
                self._delete(folder)
        for folder in self.root.glob(".removed-*"):
            shutil.rmtree(folder, ignore_errors=True)  # of a removal that broke off
        for folder in self.root.glob(".partial-*"):
            if folder.name.removeprefix(".partial-") not in needed:
                shutil.rmtree(folder)

    def _check_room(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self.root).free
        if free < num_bytes:
            raise RegistryUnavailable(f"{self.root} has {free:,} bytes free, {num_bytes:,} needed")

    def _check_inside(self, bundle_id: str, name: str) -> None:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or path.as_posix() != name:
            raise BundleError(f"{self.name}/bundles/{bundle_id}: {name!r} can't be a file of it")

    def _content(self, bundle_id: str) -> bytes:
        try:
            with self._reaching(f"bundles/{bundle_id}/{MANIFEST}"):
                found: bytes = self._files.cat_file(self._remote("bundles", bundle_id, MANIFEST))
                return found
        except FileNotFoundError:
            raise self.unknown(bundle_id) from None

    def _objects(self, *folders: str) -> dict[str, dict[str, Any]]:
        """What the object store says of each object in a folder, by its path there."""
        folder = self._remote(*folders)
        with self._reaching("/".join(folders)):
            # Not glob, which leaves out what it could not list.
            found = self._files.find(folder, detail=True)
        return {str(PurePosixPath(path).relative_to(folder)): found[path] for path in found}

    def _folder(self, bundle_id: str, kind: str = "bundles") -> Path:
        if not self.is_id(bundle_id):
            raise self.unknown(bundle_id)
        return self.root / kind / bundle_id

    def _remote(self, *parts: str) -> str:
        return "/".join((self._prefix, *parts))

    @contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, RegistryError, BundleError):
            raise
        except Exception as error:  # each kind of object store has errors of its own
            text = f"{self.name}/{what}: {type(error).__name__}: {error}"
            raise RegistryUnavailable(text) from error


def _lock_now(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
