import socket

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.report.command import PAGE


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_report_writes_one_file_beside_the_run_or_elsewhere(make_run, tmp_path):
    run = make_run("a")
    result = call("report", run)
    assert result.exit_code == 0 and str(run / PAGE) in result.output
    assert call("report", run, "--out", tmp_path / "far" / "away.html").exit_code == 0
    assert (run / PAGE).read_text() == (tmp_path / "far" / "away.html").read_text()


@pytest.mark.parametrize("command", ["report", "watch"])
@pytest.mark.parametrize("place, said", [("nowhere", "no such folder"), ("", "no run is in it")])
def test_what_is_no_run_is_refused(tmp_path, command, place, said):
    (tmp_path / "empty").mkdir()
    result = call(command, tmp_path / "empty" / place)
    assert result.exit_code == 2 and said in result.output


def test_a_report_of_several_runs_is_refused_with_their_names(make_run):
    first, second = make_run("a"), make_run("b")
    result = call("report", first.parent)
    assert result.exit_code == 2 and str(first) in result.output and str(second) in result.output
    assert "fluxfill watch" in result.output and not (first.parent / PAGE).exists()


def test_a_place_that_cannot_be_written_is_named(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    result = call("report", make_run("a"), "--out", tmp_path / "file" / "page.html")
    assert result.exit_code == 2 and "--out" in result.output


def test_watch_takes_folders_of_runs_and_ends_by_ctrl_c(make_run, monkeypatch):
    run = make_run("a")
    make_run("b")

    def interrupt(server):
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.report.serve.WatchServer.serve_forever", interrupt)
    result = call("watch", run.parent, run, "--port", 0)
    assert result.exit_code == 0 and "http://127.0.0.1:" in result.output and "(2 runs" in result.output


def test_a_port_that_is_taken_is_said(make_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = call("watch", make_run("a"), "--port", taken.getsockname()[1])
    assert result.exit_code == 2 and "Give another one" in result.output
