from pathlib import Path

import pytest

from configs.errors import InputError
from launch.slurm.submit import clean_environment, submit_job


def test_a_job_inherits_no_variable_of_another_but_where_the_cluster_is() -> None:
    given = {"SLURM_CONF": "/c", "SLURM_RESTART_COUNT": "3", "SLURM_MEM_PER_NODE": "1", "SBATCH_NO_REQUEUE": "1"}
    given |= {
        "SLURM_ARRAY_TASK_ID": "5",
        "PATH": "/bin",
        "HF_TOKEN": "t",
        "SALLOC_ACCOUNT": "a",
        "SRUN_CPUS_PER_TASK": "1",
    }
    assert clean_environment(given) == {"SLURM_CONF": "/c", "PATH": "/bin", "HF_TOKEN": "t"}


def sbatch(folder: Path, text: str) -> dict[str, str]:
    (folder / "sbatch").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "sbatch").chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_the_id_is_read_also_where_sbatch_names_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    environ = sbatch(tmp_path, 'echo "$@" > asked; pwd > where; echo "77;west"')
    assert submit_job(tmp_path / "a b.sbatch", tmp_path, environ, ["--dependency=afterok:7"]) == "77"
    assert (tmp_path / "asked").read_text() == f"--parsable --dependency=afterok:7 {tmp_path}/a b.sbatch\n"
    assert (tmp_path / "where").read_text() == f"{tmp_path}\n"


def test_what_sbatch_says_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    environ = sbatch(tmp_path, "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(InputError, match="invalid partition specified: gpu"):
        submit_job(tmp_path / "a.sbatch", tmp_path, environ)


def test_a_machine_without_sbatch_is_no_login_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="submit from a login node"):
        submit_job(tmp_path / "a.sbatch", tmp_path, {"PATH": str(tmp_path)})
