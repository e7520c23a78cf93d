"""Signing in: passwords, users with few permissions, TLS, Unix sockets; and who never sees them."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
import trustme
from servers import Server, debian_redis, free_port, running_server
from test_store import LONG_MS, UNKNOWN, look, many_ids, window_of

from embeddings_store import (
    Store,
    StoreError,
    StoreRejected,
    StoreUnavailable,
    WindowRef,
    open_store,
)

IDS = many_ids(200)
SECRET, WRONG = "s3cret", "hunter2"
AWKWARD = "p@ss/w:ö?rd#%"
"""A password that a URL can only hold percent-encoded."""


def works(url: str, prefix: str = "ecdctr") -> None:
    """Publishes at the URL and reads there."""
    store = open_store(url, prefix=prefix, max_connections=2)
    ref = store.publish(window_of(IDS))
    assert look(store, ref, "items", IDS).present.all()
    store.remove(ref)
    assert store.windows() == []
    store.close()


def refused(url: str) -> list[StoreError]:
    """The errors of a blocking and of an async sign-in."""
    store = open_store(url, max_connections=2)
    with pytest.raises(StoreError) as blocking:
        store.windows()
    with pytest.raises(StoreError) as asynchronous:
        asyncio.run(store.reader(UNKNOWN))
    store.close()
    return [blocking.value, asynchronous.value]


# Passwords and users.


def test_a_password_with_every_awkward_character_signs_in_when_encoded() -> None:
    with running_server(password=AWKWARD) as server:
        works(f"redis://:{quote(AWKWARD, safe='')}@127.0.0.1:{server.port}/0")
        for error in refused(f"redis://:{quote(AWKWARD[:-1], safe='')}@127.0.0.1:{server.port}/0"):
            assert type(error) is StoreRejected
        for error in refused(f"redis://127.0.0.1:{server.port}/0"):
            assert type(error) is StoreRejected


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as running:
        yield running


@pytest.fixture
def serving(server: Server) -> Iterator[str]:
    """URL of a user who may do what a reader needs, and nothing else."""
    rights = ["+ping", "+hget", "+mget", "~ecdctr:*", "~{ecdctr}:*"]
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "serving", "reset", "on", f">{SECRET}", *rights)
        yield server.url.replace("//", f"//serving:{SECRET}@")
        client.execute_command("ACL", "DELUSER", "serving")


def test_a_reader_needs_three_commands_and_a_publisher_more(server: Server, serving: str) -> None:
    ref = open_store(server.url).publish(window_of(IDS))
    assert look(open_store(serving, max_connections=2), ref, "items", IDS).present.all()
    store = open_store(serving)
    for action in (store.windows, lambda: store.publish(window_of(IDS, 1))):
        with pytest.raises(StoreRejected, match="permissions"):
            action()
    other = open_store(serving, prefix="other")
    with pytest.raises(StoreRejected, match="permissions"):
        asyncio.run(other.reader(ref))
    for each in (store, other):
        each.close()


def test_a_right_that_is_withdrawn_meanwhile_rejects_and_piles_up_no_connections(
    server: Server, serving: str
) -> None:
    async def run(client: redis.Redis) -> None:
        ref = open_store(server.url).publish(window_of(IDS))
        reader = await open_store(serving, max_connections=2).reader(ref)
        before = client.info("clients")["connected_clients"]
        client.execute_command("ACL", "SETUSER", "serving", "-mget")
        kinds = set()
        for _ in range(200):
            with pytest.raises(StoreError, match="permissions") as caught:
                await reader.lookup("items", IDS, deadline_ms=LONG_MS)
            kinds.add(type(caught.value))
        assert kinds <= {StoreRejected, StoreUnavailable}
        assert client.info("clients")["connected_clients"] <= before + 2
        client.execute_command("ACL", "SETUSER", "serving", "+mget")
        await asyncio.sleep(0.1)
        assert (await reader.lookup("items", IDS, deadline_ms=LONG_MS)).present.all()
        await reader.close()

    with server.client() as client:
        asyncio.run(run(client))


def test_a_unix_socket_works_with_a_password_and_a_database() -> None:
    with tempfile.TemporaryDirectory(prefix="ecdctr-") as folder:
        path = f"{folder}/server.sock"
        with running_server("--unixsocket", path, password=AWKWARD):
            works(f"unix://:{quote(AWKWARD, safe='')}@{path}?db=3")
            for error in refused(f"unix://{path}"):
                assert type(error) is StoreRejected
        for error in refused(f"unix://:{SECRET}@{path}"):
            assert type(error) is StoreUnavailable
            assert path in str(error)


# TLS.


@dataclass(frozen=True)
class Certificates:
    """Files of an authority and of what it has signed."""

    folder: Path

    def make(self, *names: str) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.file("authority"))
        for name in names:
            issued = authority.issue_cert(name)
            issued.cert_chain_pems[0].write_to_path(self.file(name))
            issued.private_key_pem.write_to_path(self.file(f"{name}.key"))

    def file(self, name: str) -> str:
        return str(self.folder / f"{name}.pem")

    def serving(self, name: str, port: int, *, clients: str = "no") -> list[str]:
        """Options of a server that has the certificate of `name` and speaks only TLS."""
        files = ["--tls-cert-file", self.file(name), "--tls-key-file", self.file(f"{name}.key")]
        who = ["--tls-ca-cert-file", self.file("authority"), "--tls-auth-clients", clients]
        return ["--port", "0", "--tls-port", str(port), *files, *who]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    made = Certificates(tmp_path_factory.mktemp("certificates"))
    made.make("127.0.0.1", "elsewhere.example", "client.example")
    return made


@pytest.fixture(scope="module")
def tls(certificates: Certificates) -> Iterator[Server]:
    port = free_port()
    options = certificates.serving("127.0.0.1", port)
    with running_server(*options, binary=debian_redis(), port=port, password=SECRET) as running:
        yield running


def test_a_server_with_tls_is_read_and_written(tls: Server, certificates: Certificates) -> None:
    trusted = f"ssl_ca_certs={certificates.file('authority')}"
    works(f"rediss://:{SECRET}@127.0.0.1:{tls.port}/2?{trusted}")
    works(f"rediss://:{SECRET}@127.0.0.1:{tls.port}?{trusted}")


def test_a_reader_over_tls_gets_over_killed_connections(
    tls: Server, certificates: Certificates
) -> None:
    url = f"rediss://:{SECRET}@127.0.0.1:{tls.port}/0?ssl_ca_certs={certificates.file('authority')}"

    async def run() -> None:
        store = open_store(url, max_connections=2)
        reader = await store.reader(store.publish(window_of(IDS)))
        for _ in range(5):
            with redis.Redis.from_url(url) as client:
                client.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.01)
            assert (await reader.lookup("items", IDS, deadline_ms=LONG_MS)).present.all()
        await reader.close()
        store.close()

    asyncio.run(run())


def test_a_certificate_that_nobody_trusts_or_of_another_host_is_refused(
    tls: Server, certificates: Certificates
) -> None:
    errors = refused(f"rediss://:{SECRET}@127.0.0.1:{tls.port}/0")  # signed by nobody known
    port = free_port()
    options = certificates.serving("elsewhere.example", port)
    with running_server(*options, binary=debian_redis(), port=port):
        trusted = f"ssl_ca_certs={certificates.file('authority')}"
        errors += refused(f"rediss://:{SECRET}@127.0.0.1:{port}/0?{trusted}")
    for error in errors:
        assert type(error) is StoreUnavailable
        assert "certificate" in str(error)
        assert SECRET not in chain(error)


def test_a_server_that_wants_a_certificate_of_its_clients_gets_it(
    certificates: Certificates,
) -> None:
    port = free_port()
    options = certificates.serving("127.0.0.1", port, clients="yes")
    trusted = f"ssl_ca_certs={certificates.file('authority')}"
    own = (
        f"ssl_certfile={certificates.file('client.example')}"
        f"&ssl_keyfile={certificates.file('client.example.key')}"
    )
    with running_server(*options, binary=debian_redis(), port=port):
        works(f"rediss://127.0.0.1:{port}/0?{trusted}&{own}")
        for error in refused(f"rediss://127.0.0.1:{port}/0?{trusted}"):
            assert type(error) is StoreUnavailable


def test_speaking_plainly_to_a_server_with_tls_is_unavailable(tls: Server) -> None:
    for error in refused(f"redis://127.0.0.1:{tls.port}/0"):
        assert isinstance(error, StoreUnavailable)


@contextmanager
def lone_master(*options: str, binary: str = "", port: int, query: str = "") -> Iterator[Server]:
    """A cluster of one server, which has all slots and wants `SECRET`."""
    cluster = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    with running_server(*cluster, *options, binary=binary, port=port, password=SECRET) as running:
        scheme = "rediss" if query else "redis"
        url = f"{scheme}://:{SECRET}@127.0.0.1:{port}?{query}"
        with redis.Redis.from_url(url) as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16_383)
            while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                time.sleep(0.01)
        yield running


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_cluster_with_tls_and_a_password_is_read_and_written(
    certificates: Certificates, slash: str
) -> None:
    port = free_port()
    options = [*certificates.serving("127.0.0.1", port), "--tls-cluster", "yes"]
    trusted = f"ssl_ca_certs={certificates.file('authority')}"
    with lone_master(*options, binary=debian_redis(), port=port, query=trusted):
        dead = f"127.0.0.1:{free_port()}"
        works(f"rediss+cluster://:{SECRET}@{dead},127.0.0.1:{port}{slash}?{trusted}")
        for error in refused(f"rediss+cluster://:{WRONG}@127.0.0.1:{port}{slash}?{trusted}"):
            assert type(error) is StoreRejected


def test_a_server_that_is_no_cluster_is_not_taken_for_one(server: Server) -> None:
    for error in refused(f"redis+cluster://127.0.0.1:{server.port}"):
        assert "luster" in str(error)
        assert str(server.port) in str(error)


# Secrets.


@contextmanager
def signed_in(kind: str, certificates: Certificates) -> Iterator[str]:
    """The URL of a server of some kind, with {} in the place of the password `SECRET`."""
    port = free_port()
    if kind == "tls":
        query = f"ssl_ca_certs={certificates.file('authority')}"
        options = certificates.serving("127.0.0.1", port)
        with running_server(*options, binary=debian_redis(), port=port, password=SECRET):
            yield f"rediss://:{{}}@127.0.0.1:{port}/0?{query}"
    elif kind == "cluster":
        with lone_master(port=port):
            yield f"redis+cluster://:{{}}@127.0.0.1:{port},127.0.0.1:{free_port()}"
    elif kind == "user":
        with running_server(port=port) as running, running.client() as client:
            client.execute_command("ACL", "SETUSER", "ann", "on", f">{SECRET}", "~*", "+@all")
            yield f"redis://ann:{{}}@127.0.0.1:{port}/0"
    else:
        with running_server(port=port, password=SECRET):
            yield f"redis://:{{}}@127.0.0.1:{port}/0"


async def used(store: Store, ref: WindowRef) -> str:
    """Reads, with a reader whose connections end halfway; what a log of it could show."""
    reader = await store.reader(ref)
    for _ in range(3):
        with suppress(StoreUnavailable):
            await reader.lookup("items", IDS, deadline_ms=0.01)
        await asyncio.sleep(0.05)
    assert (await reader.lookup("items", IDS, deadline_ms=LONG_MS)).present.all()
    shown = repr(reader) + str(vars(reader))
    await reader.close()
    return shown


@pytest.mark.parametrize("kind", ["password", "user", "cluster", "tls"])
def test_a_password_is_in_no_error_no_repr_and_no_log(
    kind: str, certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with signed_in(kind, certificates) as url:
        store = open_store(url.format(SECRET), max_connections=2)
        ref = store.publish(window_of(IDS))
        shown = repr(store) + str(vars(store)["_address"]) + asyncio.run(used(store, ref))
        errors = refused(url.format(WRONG))
        assert {type(error) for error in errors} <= {StoreRejected, StoreUnavailable}
        store.close()
    errors += refused(url.format(SECRET))
    assert {type(error) for error in errors[2:]} == {StoreUnavailable}
    shown += " ".join(map(chain, errors)) + caplog.text
    assert "asyncio" in caplog.text  # else nothing was caught
    assert "127.0.0.1" in shown
    for secret in (SECRET, WRONG):
        assert secret not in shown


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter/2@host:6379/0",
        "redis://:hunter?2@host:6379/0",
        "redis://:hunter#2@host:6379/0",
        "redis://ann:4711/hunter@host/0",
        "redis://ann:4711?hunter@host/0",
        "redis://:hunter2@host:port/0",
        "redis+cluster://:hunter2@host:6379,host:port",
        "redis+cluster://:hunter2@host:6379/1",
        "redis://:hunter2@host:6379,host:6380",
        "gopher://hunter",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="redis") as caught:
        open_store(url)
    for secret in ("hunter", "4711"):
        assert secret not in chain(caught.value)


def chain(error: BaseException | None) -> str:
    """All that a log of the error could show."""
    if error is None:
        return ""
    shown = "".join(traceback.format_exception(error)) + repr(error)
    return shown + chain(error.__cause__)
