import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.errors import InputError, StorageFailed
from configs.supervision import BAD_INPUT, FAILED, STOPPED, SUPERVISOR
from tests.patience import PATIENCE
from trainer.process.command_line import check_command_line
from trainer.process.outcome import AlreadyDone, StartAgain, Stopped, run_and_report
from trainer.process.run_owner import disown

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """A single process that nobody asked for an outcome."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("FLUXFILL_OUTCOME", raising=False)
    monkeypatch.delenv(SUPERVISOR, raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # quiet_libraries sets it for good
    yield
    disown()


def outcome_in(folder: Path) -> dict:
    return json.loads((folder / "outcome.json").read_text())


def test_a_finished_run_leaves_its_step_in_the_run_folder(arguments, tmp_path):
    assert run_and_report(lambda: 1500) == 0
    assert outcome_in(tmp_path / "test") == {"code": 0, "reason": "done", "step": 1500, "again": None}


@pytest.mark.parametrize("end", [None, InputError("wrong."), Stopped(4, None, 4), StartAgain("it hangs", why="hang")])
def test_without_a_supervisor_an_end_is_told_to_the_webhook_once(arguments, monkeypatch, end):
    sent = []
    monkeypatch.setattr("trainer.process.outcome.notify_end", lambda run, *, code, **_: sent.append((run, code)))

    def work():
        if end is not None:
            raise end
        return 9

    code = run_and_report(work)
    assert sent == [("test", code)]
    monkeypatch.setenv(SUPERVISOR, "1")  # which sends it
    run_and_report(work)
    assert len(sent) == 1


def test_bad_input_is_code_2_told_once_and_on_one_stream(arguments, tmp_path, capsys):
    def work():
        raise InputError("model.base /x: no such folder. Give one.")

    assert run_and_report(work) == BAD_INPUT == 2
    assert outcome_in(tmp_path / "test") == {
        "code": 2,
        "reason": "model.base /x: no such folder. Give one.",
        "step": None,
        "again": None,
    }
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "model.base /x: no such folder. Give one.\n")


@pytest.mark.parametrize("end", [InputError("wrong."), Stopped(4, None, 4), StartAgain("it hangs", why="hang")])
@pytest.mark.parametrize("is_written", [True, False])
def test_below_a_supervisor_which_says_it_last_it_is_not_said_twice(arguments, monkeypatch, capsys, end, is_written):
    def work():
        if not is_written:
            monkeypatch.setattr("trainer.process.outcome.write_text_atomically", refuse)
        raise end

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setenv(SUPERVISOR, str(os.getppid()))
    assert run_and_report(work) != 0
    told = capsys.readouterr()
    assert (str(end) in (told.out + told.err).splitlines()) == (not is_written)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), KeyboardInterrupt("stopped")])
def test_anything_else_is_written_and_raised_on(arguments, tmp_path, error):
    def work():
        raise error

    with pytest.raises(type(error)):
        run_and_report(work)
    told = outcome_in(tmp_path / "test")
    assert told == {"code": 1, "reason": f"{type(error).__name__}: {error}", "step": None, "again": None}


def test_what_may_be_started_again_says_so_without_a_traceback(arguments, tmp_path, capsys):
    def work():
        raise StartAgain("4 do not fit; the same command goes on with 2", why="out of memory")

    assert run_and_report(work) == FAILED
    told = outcome_in(tmp_path / "test")
    assert (told["code"], told["again"]) == (1, "out of memory")
    assert capsys.readouterr().err == "4 do not fit; the same command goes on with 2\n"


def test_a_gpu_without_memory_names_the_page_that_helps(arguments, tmp_path):
    def work():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run_and_report(work)
    assert outcome_in(tmp_path / "test")["reason"].endswith("docs/troubleshooting.md#out-of-memory")


def test_the_outcome_goes_where_it_was_asked_for(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUXFILL_OUTCOME", str(tmp_path / "asked" / "outcome.json"))
    run_and_report(lambda: 7)
    assert outcome_in(tmp_path / "asked")["step"] == 7
    assert not (tmp_path / "test" / "outcome.json").exists()


def test_storage_that_fails_is_code_1_and_told_without_a_traceback(arguments, tmp_path, capsys):
    """A supervisor may start again what it must not after bad input."""

    def work():
        raise StorageFailed("s3://b/a.tar: failed 8 time(s).")

    assert run_and_report(work) == FAILED == 1
    assert outcome_in(tmp_path / "test")["code"] == 1
    assert capsys.readouterr().err == "s3://b/a.tar: failed 8 time(s).\n"


@pytest.mark.parametrize("number, code", [(errno.EIO, 1), (errno.ESTALE, 1), (errno.ENOSPC, 1), (errno.EACCES, 2)])
def test_a_folder_that_cannot_be_taken_is_bad_input_unless_its_disk_fails(
    arguments, tmp_path, monkeypatch, number, code
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", refuse)
    assert run_and_report(lambda: 7) == code


def test_an_outcome_for_which_there_is_no_room_is_code_1(arguments, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert run_and_report(lambda: None) == 0
    monkeypatch.setattr("trainer.process.outcome.write_text_atomically", refuse)
    assert run_and_report(lambda: 7) == FAILED


@pytest.mark.parametrize(
    "error, code",
    [
        (InputError("train.lr: too high."), BAD_INPUT),
        (StartAgain("4 do not fit", why="out of memory"), FAILED),
        (RuntimeError("CUDA error"), None),
    ],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_no_outcome_hides_no_error(arguments, tmp_path, monkeypatch, capsys, number, error, code):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    def work():
        monkeypatch.setattr("trainer.process.outcome.write_text_atomically", refuse)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no folder" / "error.json"))
        raise error

    if code is None:
        with pytest.raises(RuntimeError, match="CUDA error"):
            run_and_report(work)
    else:
        assert run_and_report(work) == code
        assert str(error) in capsys.readouterr().err.splitlines()
    assert not (tmp_path / "test" / "outcome.json").exists()


@pytest.mark.parametrize(
    "end, code", [(Stopped(4, "SIGTERM", 4), STOPPED), (AlreadyDone(4, "all 4 steps are done"), 0)]
)
def test_a_disk_that_takes_no_outcome_changes_no_end(arguments, tmp_path, monkeypatch, capsys, caplog, end, code):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)

    def work():
        monkeypatch.setattr("trainer.process.outcome.write_text_atomically", refuse)
        raise end

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert run_and_report(work) == code
    assert capsys.readouterr().out == f"{end}\n"
    assert "not written: outcome: " in caplog.text and "Input/output error" in caplog.text


def test_an_outcome_of_an_earlier_start_that_cannot_be_removed_is_told(arguments, tmp_path, monkeypatch, capsys):
    """It would be taken for this start's."""
    run_and_report(lambda: 10)

    unlink = Path.unlink

    def refuse(path, **options):
        if path.name == "outcome.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert run_and_report(lambda: 11) == FAILED
    assert "outcome.json: cannot be removed (Input/output error)" in capsys.readouterr().err


def test_of_what_goes_well_only_rank_0_tells(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_and_report(lambda: 3) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_fails_alone_speaks_and_what_follows_from_it_is_not_the_outcome(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("trainer.process.outcome._MAIN_SPEAKS_FIRST_SECONDS", 0.0)
    outcomes = []

    def work_of_rank_5():
        raise InputError("a.tar: damaged.")

    def work_of_rank_0():
        monkeypatch.setenv("RANK", "5")
        assert run_and_report(work_of_rank_5) == BAD_INPUT
        monkeypatch.setenv("RANK", "0")
        outcomes.append(outcome_in(tmp_path / "test"))
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match="Connection closed"):
        run_and_report(work_of_rank_0)
    outcomes.append(outcome_in(tmp_path / "test"))
    assert outcomes == [{"code": 2, "reason": "rank 5: a.tar: damaged.", "step": None, "again": None}] * 2
    assert capsys.readouterr().err == "rank 5: a.tar: damaged.\n"
    assert sorted(path.name for path in (tmp_path / "test").iterdir()) == ["outcome.json", "owner-1.json"]


@pytest.mark.parametrize("taken", [False, True])
def test_a_failure_is_told_on_a_filesystem_without_links(arguments, tmp_path, monkeypatch, taken):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    def work():
        if taken:
            (tmp_path / "test" / "outcome.json").write_text('{"code": 2, "reason": "rank 3: first", "step": null}')
        raise InputError("wrong")

    monkeypatch.setattr("os.link", refuse)
    assert run_and_report(work) == BAD_INPUT
    assert outcome_in(tmp_path / "test")["reason"] == ("rank 3: first" if taken else "wrong")
    assert sorted(path.name for path in (tmp_path / "test").iterdir()) == ["outcome.json", "owner-1.json"]


def test_what_all_ranks_find_wrong_is_said_once(tmp_path, patient_main):
    """By real processes, at the same time."""
    outcome = tmp_path / "outcome.json"
    ranks = [
        subprocess.Popen(
            [sys.executable, patient_main, "--config", "configs/demo.yaml", "train.lrr=1"],
            cwd=ROOT,
            env={**os.environ, "FLUXFILL_OUTCOME": str(outcome), "RANK": str(rank), "WORLD_SIZE": "3"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    told = [process.communicate(timeout=PATIENCE)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2, 2]
    assert "train.lr" in told[0] and told[1:] == ["", ""]
    assert json.loads(outcome.read_text())["code"] == 2


def test_a_rank_that_leaves_the_word_to_rank_0_leaves_it_for_the_launcher_all_the_same(
    arguments, tmp_path, monkeypatch, capsys
):
    """Rank 0 may have written the outcome, and not ended yet: the summary is of whichever end comes first."""

    def work():
        raise InputError("wrong")

    (tmp_path / "outcome.json").write_text('{"code": 2, "reason": "wrong", "step": null}')
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("FLUXFILL_OUTCOME", str(tmp_path / "outcome.json"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert run_and_report(work) == BAD_INPUT
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "wrong"
    assert capsys.readouterr() == ("", "")


def test_a_check_that_passes_is_no_outcome(arguments, tmp_path):
    """Were it one, a run killed right after it would look done."""
    assert run_and_report(check_command_line) == 0
    assert not (tmp_path / "test" / "outcome.json").exists()


def test_the_outcome_of_an_earlier_start_is_gone_once_work_begins(arguments, tmp_path):
    run_and_report(lambda: 10)
    seen = []
    run_and_report(lambda: seen.append((tmp_path / "test" / "outcome.json").exists()))
    assert seen == [False]
    assert not (tmp_path / "test" / "outcome.json").exists()


def test_what_another_rank_says_between_the_check_and_the_training_stays(arguments, tmp_path):
    """Rank 0 imports torch meanwhile, for ten seconds."""
    assert run_and_report(check_command_line) == 0
    first = {"code": 2, "reason": "rank 5: a.tar: damaged.", "step": None, "again": None}
    (tmp_path / "test" / "outcome.json").write_text(json.dumps(first))

    def work():
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError):
        run_and_report(work)
    assert outcome_in(tmp_path / "test") == first


def test_a_wrong_config_has_no_run_folder_to_write_to(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py", "--config", "missing.yaml"])
    assert run_and_report(check_command_line) == BAD_INPUT
    assert list(tmp_path.iterdir()) == []
    assert "missing.yaml" in capsys.readouterr().err


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "needs a config: --config CONFIG.yaml"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "configs/demo.yaml", "train.lrr=1"], "train.lr"),
    ],
)
def test_bad_input_ends_the_program_at_once_with_code_2(tmp_path, arguments, words):
    """Before torch is imported: that alone takes ten seconds."""
    outcome = tmp_path / "outcome.json"
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "trainer/main.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "FLUXFILL_OUTCOME": str(outcome)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    told = [line for line in ended.stderr.splitlines() if not line.startswith("import time:")]
    imported = {
        line.rsplit("|", 1)[-1].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")
    }
    assert ended.returncode == 2
    assert words in "\n".join(told)
    assert not any("Traceback" in line for line in told)
    assert not {"torch", "diffusers", "transformers", "accelerate"} & imported
    assert json.loads(outcome.read_text())["code"] == 2


def test_the_launchers_last_lines_tell_the_reason(tmp_path):
    """torch's launcher ends with a traceback of its own and a summary of what the processes left for it."""
    ended = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "accelerate.commands.launch", "--num_processes", "2"),
            *("--config_file", "configs/engines/ddp.yaml", "--main_process_port", "0"),
            *("trainer/main.py", "--config", "configs/demo.yaml", "train.lrr=1"),
        ],
        cwd=ROOT,
        env={**os.environ, "FLUXFILL_OUTCOME": str(tmp_path / "outcome.json")},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 1
    reason, end = [line.strip() for line in ended.stderr.splitlines() if line.strip()][-2:]
    assert "train.lrr is 1, but there is no such key. Did you mean train.lr?" in reason
    assert set(end) == {"="}
