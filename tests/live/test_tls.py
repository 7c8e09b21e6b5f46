"""TLS: the plain text of both ends, each row tied to the connection that carried it."""

from __future__ import annotations

import os
import shutil
import socket
import ssl  # noqa: F401 - maps Python's libssl
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from scope_ebpf.analysis.plaintext import tie_to_connections
from scope_ebpf.loaders import libbpf
from scope_ebpf.loaders.capture import Capture, CaptureOptions
from scope_ebpf.loaders.tls import mapped_files
from scope_ebpf.loaders.trial import TIMES, record_workload
from scope_ebpf.records import LossKind, RecordKind
from tests.live.programs.tls import BODY_BYTES, CONNECTIONS, REQUESTS, ROUNDS
from tests.live.recording import PROGRAMS, Session, Target, attached, no_losses, python_target

pytestmark = pytest.mark.live

ASKED = CONNECTIONS * REQUESTS * ROUNDS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate and its key in one file, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("certificate")
    key, file = folder / "key.pem", folder / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-subj", "/CN=localhost", "-days", "2", "-keyout", key, "-out", file]
    subprocess.run(command, check=True, capture_output=True)
    file.write_bytes(key.read_bytes() + file.read_bytes())
    return file


def check(session: Session, notes: list[dict[str, object]], servers: set[int]) -> pl.DataFrame:
    """Each request is on both sides, on its connection; nothing is tied to another; none is missing."""
    no_losses(session)
    messages = session.table("messages")
    rows = tie_to_connections(session.table("tls"), messages)
    assert rows.columns == [*messages.columns, "ssl", "tls", "untied"]
    assert rows["untied"].null_count() == len(rows), rows["untied"].value_counts()
    assert rows["kind"].unique().to_list() == ["tcp"]
    assert rows["stream_end"].null_count() == 0
    assert len(notes) == ASKED
    turns = rows.filter("turn").with_columns(
        pl.col("payload").bin.head(4) == b"GET ",
        text=pl.col("payload").bin.head(40).cast(pl.String),
    )
    asked = turns.filter("payload").with_columns(
        name=pl.col("text").str.extract("^GET /([^ ]+) HTTP/1.1\r\n")
    )
    truth = pl.DataFrame(notes, schema={"name": pl.String, "client": pl.Int64, "server": pl.Int64})
    for direction, mine, theirs in (("send", "client", "server"), ("receive", "server", "client")):
        side = asked.filter(direction=direction)
        found = side.select("name", pl.col("local_port", "remote_port").cast(pl.Int64)).sort("name")
        wanted = truth.select(
            "name", pl.col(mine).alias("local_port"), pl.col(theirs).alias("remote_port")
        ).sort("name")
        assert found.equals(wanted)
        assert (set(side["tgid"]) <= servers) == (direction == "receive")
    # the plain text of a connection's answers is as long at both ends, and what was asked for
    answers = rows.filter(
        pl.when(pl.col("tgid").is_in(list(servers)))
        .then(pl.col("direction") == "send")
        .otherwise(pl.col("direction") == "receive")
    )
    totals = answers.group_by("stream", "direction").agg(pl.col("length_bytes").sum())
    assert len(totals) == 2 * CONNECTIONS * ROUNDS
    assert totals.group_by("stream").agg(pl.col("length_bytes").n_unique())[
        "length_bytes"
    ].unique().to_list() == [1]
    assert (totals["length_bytes"] > BODY_BYTES * REQUESTS).all()
    # ciphertext comes and goes in the order of the plain text
    order = rows.sort("start_ns").select(
        pl.col("stream_end").cast(pl.Int64).diff().over("connection", "direction")
    )
    assert (order["stream_end"].drop_nulls() >= 0).all()
    # requests and responses are told from it, and both ends of each are one request
    spans = session.recording.spans().collect().filter(protocol="http", state="complete")
    asked_for, handled = (spans.filter(pl.col("kind") == kind) for kind in ("client", "server"))
    assert len(asked_for) == len(handled) == ASKED
    assert asked_for["detail"].n_unique() == ASKED
    pairs = handled.join(asked_for, left_on="parent_id", right_on="span_id", suffix="_client")
    assert len(pairs) == ASKED
    assert (pairs["detail"] == pairs["detail_client"]).all()
    assert (pairs["evidence"] == "exact").all()
    return rows


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_python(kind, certificate, tmp_path):
    with (
        python_target("tls", kind, certificate) as target,
        attached(tmp_path, target, "--unredacted") as session,
    ):
        notes = target.work()
    servers = set(session.table("tls")["tgid"]) - {session.target}
    assert len(servers) == 1
    # the probes make calls of their own, which are not the program's
    assert (
        session.table("syscalls").filter(pl.col("name").is_in(["uprobe", "uretprobe"])).is_empty()
    )
    rows = check(session, notes, servers)
    if kind == "blocking":
        # most of an answer is read from OpenSSL's buffer, without a system call
        client = rows.filter(tgid=session.target, direction="receive")
        assert len(client) > 2 * client["stream_end"].n_unique()


@pytest.mark.parametrize(
    "bundled", sorted(Path(sys.prefix).glob("lib/python3*/site-packages/psycopg*.libs/libssl*"))
)
def test_a_library_that_came_with_a_package(bundled, certificate, tmp_path):
    """Python's own ssl made to use it; from OpenSSL 3.3 on it is probed in another way."""
    crypto = next(bundled.parent.glob("libcrypto*"))
    (tmp_path / "libssl.so.3").symlink_to(bundled)
    (tmp_path / "libcrypto.so.3").symlink_to(crypto)
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{tmp_path}:{bundled.parent}"}
    with (
        python_target("tls", "blocking", certificate, env=environment) as target,
        attached(tmp_path, target, "--unredacted") as session,
    ):
        assert str(bundled) in Path(f"/proc/{target.pid}/maps").read_text()
        notes = target.work()
    check(session, notes, set(session.table("tls")["tgid"]) - {session.target})


def test_a_library_of_another_mount_namespace(certificate, tmp_path):
    """As in a container: the file that the process sees at that path is not ours."""
    (found,) = {
        name
        for name in mapped_files(Path("/proc/self/maps").read_text())
        if name.rpartition("/")[2] == "libssl.so.3"
    }
    copy = tmp_path / "libssl.so.3"
    shutil.copy(found, copy)
    script = 'mount --bind "$0" "$1" && shift && exec "$@"'
    command = [sys.executable, PROGRAMS / "tls.py", "blocking", certificate]
    with (
        Target("unshare", "--mount", "sh", "-c", script, copy, found, *command) as target,
        attached(tmp_path, target, "--unredacted") as session,
    ):
        notes = target.work()
    check(session, notes, set(session.table("tls")["tgid"]) - {session.target})


CONFIGURATION = """
daemon off;
master_process on;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {certificate};
        location / {{ return 200 "{body}"; }}
    }}
}}
"""


class Nginx:
    """An nginx of our own; a context manager."""

    def __init__(self, folder: Path, certificate: Path) -> None:
        """Start it, and wait until it listens."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        file = folder / "nginx.conf"
        body = "." * (BODY_BYTES + 100)
        # nginx takes no parameter that is longer than a few KB: a variable for each piece
        file.write_text(
            CONFIGURATION.format(
                folder=folder, port=self.port, certificate=certificate, body="$answer"
            ).replace(
                "    server {",
                "".join(
                    f'    map "" $part{n} {{ default "{body[:3000]}"; }}\n'
                    for n in range(len(body) // 3000 + 1)
                )
                + '    map "" $answer { default "'
                + "".join(f"$part{n}" for n in range(len(body) // 3000 + 1))
                + '"; }\n    server {',
            )
        )
        self.process = subprocess.Popen(["nginx", "-p", folder, "-c", file], stderr=subprocess.PIPE)
        self.pid = self.process.pid
        for _ in range(500):
            with socket.socket() as end:
                if end.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.01)
        raise AssertionError("nginx does not listen")

    def __enter__(self) -> Nginx:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.process.terminate()
        self.process.communicate()


def test_nginx(certificate, tmp_path):
    if shutil.which("nginx") is None:
        pytest.skip("needs nginx")
    folder = tmp_path / "nginx"
    folder.mkdir()
    with Nginx(folder, certificate) as nginx, python_target("tls", "client", nginx.port) as target:
        children = Path(f"/proc/{nginx.pid}/task/{nginx.pid}/children").read_text().split()
        named: list[Target] = [target]
        with attached(tmp_path, named, "--pid", nginx.pid, "--unredacted") as session:
            notes = target.work()
            session.stop()
    check(session, notes, {int(child) for child in children})


def test_kernels_without_multi_uprobes(monkeypatch):
    """Before 6.6 each uprobe is a perf event."""
    monkeypatch.setattr(libbpf, "has_multi_uprobes", lambda: False)
    assert record_workload("tls") == TIMES


def test_emitted_is_stored_plus_lost(certificate):
    with python_target("tls", "blocking", certificate) as target:
        options = CaptureOptions(tgids=(target.pid,), families=("processes", "tls"))
        with (
            Capture(replace(options, hot_slots=64, wide_slots=64)) as small,
            Capture(options) as large,
        ):
            for capture in (small, large):
                capture.start()
            target.work()
            for capture in (small, large):
                capture.stop()
            stored, everything, lost = small.drain(), large.drain(), small.lost()
            assert not large.lost().any()
    kept, emitted = (
        sum(int((run["kind"] == RecordKind.RECORD_TLS).sum()) for _, _, run in batch.hot)
        for batch in (stored, everything)
    )
    assert 0 < kept < emitted
    assert kept + int(lost[:, LossKind.LOSS_TLS].sum()) == emitted


def test_threads_that_are_not_recorded_are_not_there(certificate, tmp_path):
    """They run into the same probes."""
    with (
        python_target("tls", "blocking", certificate) as target,
        python_target("tls", "blocking", certificate) as other,
        attached(tmp_path, target, "--no-follow") as session,
    ):
        other.work()
        target.work()
    no_losses(session)
    assert session.table("tls")["tgid"].unique().to_list() == [session.target]
