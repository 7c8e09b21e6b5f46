"""`scope-ebpf export`: files, stdout, endpoints, and what it refuses."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace

from scope_ebpf.analysis.export import otlp_http
from scope_ebpf.cli.export import FORMATS, export
from scope_ebpf.errors import RecordingError, ScopeError, UsageError
from scope_ebpf.recording.reader import Recording
from tests.pure.test_export_endpoint import Receiver, received, receiving
from tests.pure.test_export_otlp import by_id
from tests.pure.traced import EDGE_ROWS, SPAN_ROWS, TREE, make_traced

pytestmark = pytest.mark.pure
IDS = {row["span_id"] for row in SPAN_ROWS}


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A recording whose spans are those of `SPAN_ROWS`."""
    traced = make_traced(tmp_path / "shop.scope")
    assert len(traced.edge_frame) == len(EDGE_ROWS)
    monkeypatch.setattr(Recording, "spans", lambda _: traced.spans())
    monkeypatch.setattr(Recording, "edges", lambda _: traced.edges())
    return traced.path


def run(path: Path, *arguments: object) -> Result:
    return CliRunner().invoke(export, [str(path), *map(str, arguments)])


def done(path: Path, *arguments: object) -> Result:
    result = run(path, *arguments)
    assert result.exit_code == 0, result.exception or result.output
    return result


def refused(kind: type[Exception], path: Path, *arguments: object) -> str:
    result = run(path, *arguments)
    assert type(result.exception) is kind, result.exception or result.output
    assert result.stdout == ""
    return str(result.exception)


def json_ids(text: str) -> set[int]:
    return {
        int(span["spanId"], 16)
        for line in text.splitlines()
        for resource in json.loads(line)["resourceSpans"]
        for span in resource["scopeSpans"][0]["spans"]
    }


def test_a_json_file(path, tmp_path):
    file = tmp_path / "shop.jsonl"
    result = done(path, "--to", "otlp-json", "-o", file)
    assert json_ids(file.read_text()) == IDS
    assert result.stdout == ""
    assert result.stderr == f"wrote 9 spans of 3 traces to {file}\n"


def test_an_otlp_file_is_one_message(path, tmp_path):
    file = tmp_path / "shop.otlp"
    done(path, "--to", "otlp", "-o", file)
    assert set(by_id(TracesData.FromString(file.read_bytes()))) == IDS


def test_a_perfetto_file_with_and_without_offcpu(path, tmp_path):
    def categories(name: str, *options: str) -> list[str]:
        file = tmp_path / name
        done(path, "--to", "perfetto", "-o", file, *options)
        packets = Trace.FromString(file.read_bytes()).packet
        return [category for packet in packets for category in packet.track_event.categories]

    assert categories("without", "--no-offcpu").count("span") == len(IDS)
    assert "off-CPU" not in categories("without2", "--no-offcpu")
    assert categories("with").count("span") == len(IDS)


@pytest.mark.parametrize("form", FORMATS)
def test_stdout_has_the_same_as_a_file(path, tmp_path, form):
    file = tmp_path / "file"
    done(path, "--to", form, "-o", file)
    result = done(path, "--to", form, "-o", "-")
    assert result.stdout_bytes == file.read_bytes()
    assert "to stdout" in result.stderr


@pytest.mark.parametrize("form", FORMATS)
def test_one_request(path, tmp_path, form):
    file = tmp_path / "file"
    result = done(path, "--to", form, "-o", file, "--request", "00000000000000a")
    assert result.stderr.startswith(f"wrote {len(TREE)} spans of 2 traces")


def test_a_file_is_not_overwritten_without_force(path, tmp_path):
    file = tmp_path / "shop.jsonl"
    file.write_text("mine")
    message = refused(ScopeError, path, "--to", "otlp-json", "-o", file)
    assert message == f"will not overwrite without --force: {file}"
    assert file.read_text() == "mine"
    done(path, "--to", "otlp-json", "-o", file, "--force")
    assert json_ids(file.read_text()) == IDS


def test_a_file_is_for_its_owner_only_and_nothing_is_left_beside_it(path, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    done(path, "--to", "otlp", "-o", folder / "shop.otlp")
    assert os.listdir(folder) == ["shop.otlp"]
    assert stat.S_IMODE((folder / "shop.otlp").stat().st_mode) == 0o600


def test_a_link_is_followed_and_stays(path, tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    done(path, "--to", "otlp-json", "-o", tmp_path / "link", "--force")
    assert (tmp_path / "link").is_symlink()
    assert json_ids((tmp_path / "real").read_text()) == IDS


def test_a_device_is_written_to_and_not_replaced(path):
    done(path, "--to", "otlp", "-o", "/dev/null", "--force")
    done(path, "--to", "otlp", "-o", "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_failure_leaves_no_part_and_the_old_file(path, tmp_path, monkeypatch):
    def broken(_: Recording) -> object:
        raise RecordingError("cannot read it")

    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a").write_text("old")
    monkeypatch.setattr(Recording, "connections", property(broken))
    refused(RecordingError, path, "--to", "otlp", "-o", folder / "a", "--force")
    assert os.listdir(folder) == ["a"]
    assert (folder / "a").read_text() == "old"


def test_places_that_cannot_be_written(path, tmp_path):
    assert "it is a directory" in refused(ScopeError, path, "--to", "otlp", "-o", tmp_path)
    missing = tmp_path / "no" / "file"
    message = refused(ScopeError, path, "--to", "otlp", "-o", missing)
    assert message == f"cannot write {missing}: No such file or directory"
    full = refused(ScopeError, path, "--to", "otlp", "-o", "/dev/full")
    assert full == "cannot write /dev/full: No space left on device"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "otlp"], "export where to? give -o FILE or --endpoint URL; -o - is stdout"),
        (["--to", "perfetto"], "export where to? give -o FILE; -o - is stdout"),
        (["--to", "otlp", "-o", "a", "--endpoint", "http://h"], "exclude each other"),
        (["--to", "perfetto", "--endpoint", "http://h"], "--endpoint takes --to otlp, not perf"),
        (["--to", "otlp", "--endpoint", "ftp://h"], "--endpoint must begin with http"),
        (["--to", "otlp", "-o", "-", "--header", "A: b"], "--header is for --endpoint"),
        (["--to", "otlp", "--endpoint", "http://h", "--header", "sec ret"], "--header is no hea"),
        (["--to", "otlp", "--endpoint", "http://h", "--header", "A: b\nC: d"], "--header is no"),
        (["--to", "otlp", "-o", "-", "--no-offcpu"], "--no-offcpu is for --to perfetto"),
        (["--to", "otlp", "-o", "-", "--force"], "--force is for -o FILE"),
        (["--to", "otlp", "-o", "-", "--request", "99"], "there is no request 99"),
    ],
)
def test_misuse(path, arguments, message):
    assert message in refused(UsageError, path, *arguments)


def test_a_header_that_is_none_is_not_repeated(path):
    arguments = ["--to", "otlp", "--endpoint", "http://h", "--header", "Bearer s3cr3t"]
    assert "s3cr3t" not in refused(UsageError, path, *arguments)


def test_a_format_must_be_known(path):
    result = run(path, "--to", "zipkin", "-o", "-")
    assert result.exit_code == 2
    assert "'otlp-json', 'otlp', 'perfetto'" in result.stderr


def test_binary_does_not_go_to_a_terminal(path, monkeypatch):
    @click.command()
    @click.pass_context
    def on_terminal(context: click.Context) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        context.invoke(export, recording=str(path), form="otlp", file="-", force=False,
                       endpoint=None, headers=(), request=None, no_offcpu=False)  # fmt: skip

    result = CliRunner().invoke(on_terminal)
    assert isinstance(result.exception, UsageError)
    assert "would garble the terminal" in str(result.exception)


def test_an_endpoint_gets_all_spans_and_the_headers(path):
    with receiving(Receiver()) as receiver:
        result = done(path, "--to", "otlp", "--endpoint", receiver.url,
                      "--header", "Authorization: Bearer k", "--header", "X-Tenant=7")  # fmt: skip
    assert received(receiver) == IDS
    assert receiver.headers[0]["Authorization"] == "Bearer k"
    assert receiver.headers[0]["X-Tenant"] == "7"
    assert result.stderr == "sent 9 spans of 3 traces\n"


def test_spans_that_an_endpoint_rejects_are_an_error(path):
    answer = ExportTraceServiceResponse()
    answer.partial_success.rejected_spans = 2
    answer.partial_success.error_message = "too old\x1b[31m"
    with receiving(Receiver(answer)) as receiver:
        message = refused(ScopeError, path, "--to", "otlp", "--endpoint", receiver.url)
    assert message.startswith("the endpoint rejected 2 of 9 spans (too old")
    assert "\x1b" not in message


def test_a_warning_of_an_endpoint_is_told(path):
    answer = ExportTraceServiceResponse()
    answer.partial_success.error_message = "please update"
    with receiving(Receiver(answer)) as receiver:
        result = done(path, "--to", "otlp", "--endpoint", receiver.url)
    assert result.stderr.endswith("the endpoint says: please update\n")


def test_an_endpoint_that_refuses_is_an_error(path):
    with receiving(Receiver(401)) as receiver:
        message = refused(otlp_http.EndpointError, path, "--to", "otlp", "--endpoint", receiver.url)
    assert "refused the spans: 401 Unauthorized (not today)" in message


def test_help_does_not_wait_for_polars_or_protobuf():
    code = (
        "import sys; import scope_ebpf.cli.export; "
        "sys.exit(bool({'polars', 'google.protobuf', 'perfetto'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )
