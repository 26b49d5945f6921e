import tomllib

import pytest

from launch.check.packages import (
    check_packages,
    check_python,
    installed_versions,
    packages_needed,
    pinned_versions,
    project_requirements,
)
from launch.command import REPO_ROOT


def test_this_python_and_these_packages_are_right(situate):
    assert check_python().state == "ok"
    (made,) = check_packages(situate())
    assert made.state == "ok" and f"torch {installed_versions()['torch']}" in made.what


@pytest.mark.parametrize(
    "overrides, package",
    [
        (["parallel.engine=zero2"], "deepspeed"),
        (["train.optimizer=adamw8bit"], "bitsandbytes"),
        (["method={type: lora}", "model.precision=nf4"], "bitsandbytes"),
        (["data.encoders.t5_precision=int8"], "bitsandbytes"),
        (["method={type: lora}", "model.precision=int8"], "torchao"),
        (["train.optimizer=prodigy", "train.lr=1.0"], "prodigyopt"),
        (["data.cache=s3://bucket/cache", "data.local_cache=/tmp/copies"], "s3fs"),
        (["data.datasets.0={name: a, tars: 'gs://bucket/{0..7}.tar'}"], "gcsfs"),
        (["data.datasets.0={name: a, table: /data/list.parquet}"], "pyarrow"),
    ],
)
def test_what_a_config_alone_needs_is_missed(overrides, package, situate):
    without = {name: version for name, version in installed_versions().items() if name != package}
    situation = situate(*overrides)
    assert package in packages_needed(situation.config, situation.engine)
    (made,) = check_packages(situation, without)
    assert made.state == "error" and f"{package} is not installed" in made.what and "pip install" in made.cure
    assert not any(made.state == "error" for made in check_packages(situate("logging.trackers=[]"), without))


def test_a_folder_of_arrow_files_needs_pyarrow(situate, folder):
    (folder / "table").mkdir()
    (folder / "table" / "data.arrow").touch()
    needs = situate(f"data.datasets.0={{name: a, table: {folder / 'table'}}}")
    assert "pyarrow" in packages_needed(needs.config, "single")
    (folder / "table" / "metadata.jsonl").touch()
    assert "pyarrow" not in packages_needed(needs.config, "single")


@pytest.mark.parametrize("version, state", [("2.0.1", "error"), ("2.11.0+cu130", "ok"), ("3.1", "error")])
def test_versions_are_held_against_their_ranges(version, state, situate):
    (made,) = check_packages(situate(), installed_versions() | {"torch": version})
    assert made.state == state and version in made.what
    assert (f"(tested: {pinned_versions()['torch']})" in made.what) == (state == "ok")


def test_each_missing_package_is_told_also_without_a_config():
    without = {name: version for name, version in installed_versions().items() if name not in ("xxhash", "pillow")}
    assert sorted(made.what.split()[0] for made in check_packages(None, without)) == ["pillow", "xxhash"]


def test_an_old_python_is_named():
    made = check_python((3, 10, 9))
    assert made.state == "error" and "Python 3.10.9" in made.what and "3.11" in made.what


def test_requirements_are_those_that_are_installed_where_there_is_no_repository(tmp_path, monkeypatch):
    of_the_repository = {(requirement.name, requirement.extra) for requirement in project_requirements()}
    monkeypatch.setattr("launch.check.packages.REPO_ROOT", tmp_path)
    installed = {(requirement.name, requirement.extra) for requirement in project_requirements()}
    assert {("torch", ""), ("s3fs", "s3"), ("prodigyopt", "prodigy")} <= installed & of_the_repository
    assert pinned_versions() == {}


def test_requirements_know_their_extras():
    extras = {requirement.name: requirement.extra for requirement in project_requirements()}
    assert extras["torch"] == "" and extras["s3fs"] == "s3" and extras["prodigyopt"] == "prodigy"
    assert "pytest" not in extras


def test_the_oldest_python_is_that_of_pyproject():
    wanted = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert check_python(tuple(map(int, wanted.removeprefix(">=").split(".")))).state == "ok"
    assert check_python((3, int(wanted.rpartition(".")[2]) - 1)).state == "error"
