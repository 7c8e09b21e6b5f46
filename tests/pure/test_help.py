"""Every command explains itself, and the README knows it."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from scope_ebpf.cli.main import COMMANDS, cli
from scope_ebpf.errors import UsageError
from scope_ebpf.loaders import targets
from scope_ebpf.recording.schema import SCHEMAS

pytestmark = pytest.mark.pure

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself(name):
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert command.help
    assert (
        command.epilog and "Examples:" in command.epilog and f"scope-ebpf {name}" in command.epilog
    )
    undocumented = [
        option.name
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert undocumented == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_readme_knows_the_command(name):
    assert f"`{name}" in README


@pytest.mark.parametrize("table", SCHEMAS)
def test_the_readme_knows_the_table(table):
    assert f"| `{table}` |" in README


def test_all_of_the_host_is_not_recorded_by_accident(monkeypatch):
    monkeypatch.setattr(targets, "check_pid_namespace", lambda: None)
    # whatever happens, this test attaches to nothing
    monkeypatch.setattr(targets, "find_target", lambda pid: pytest.fail(f"it looked for {pid}"))
    result = CliRunner().invoke(cli, ["attach", "--pid", "1"])
    assert isinstance(result.exception, UsageError)
    assert "record --all" in str(result.exception)
