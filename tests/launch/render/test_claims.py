"""What a run keeps and reads lies on the claims of its pods, or it is said."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from configs.errors import InputError
from launch.cli import app
from launch.render.claims import parse_claims

RECIPE = Path(__file__).resolve().parents[3] / "configs" / "fill_lora.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command is called, and the pods run: with a config in it."""
    (tmp_path / "my.yaml").write_text(RECIPE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path.resolve()


def render(*words: str, launcher: str = "jobset") -> Result:
    sizes = ("--nodes", "2", "--gpus-per-node", "8", "--image", "i")
    return CliRunner().invoke(app, ["render", "my.yaml", "--for", launcher, *sizes, *words])


@pytest.mark.parametrize("launcher", ["jobset", "pytorchjob"])
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--claim", "data:/data"),
        ("--claim", "data:/data", "run.dir=/database/runs"),
        ("--claim", "data:/data", "run.dir=/data/../runs"),
        ("run.dir=/runs",),
    ],
)
def test_a_run_that_a_restart_would_lose_is_refused(folder: Path, launcher: str, words: Sequence[str]) -> None:
    done = render(*words, launcher=launcher)
    assert (done.exit_code, done.stdout) == (2, "")
    place = next((word.partition("=")[2] for word in words if "run.dir" in word), str(folder / "runs"))
    said = " ".join(done.stderr.split())
    assert f"--claim NAME:{place.replace('/data/../', '/')}" in said
    assert ("run.dir=/data/runs" in said) == ("data:/data" in words)


@pytest.mark.parametrize("mount", [".", "runs", "runs/fill-lora", ".."])
def test_relative_places_lie_in_the_folder_in_which_the_pods_run(folder: Path, mount: str) -> None:
    done = render("--claim", f"data:{folder / mount}")
    assert done.exit_code == 0
    [group] = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"]
    [container] = group["template"]["spec"]["template"]["spec"]["containers"]
    assert container["workingDir"] == str(folder)
    held = container["volumeMounts"][1]["mountPath"]
    assert (folder / "runs" / "fill-lora").is_relative_to(held)
    assert ("data.cache" in done.stderr) == ("runs" in mount)


def test_what_the_image_may_hold_is_a_warning(folder: Path) -> None:
    (folder / "fill").mkdir()
    asked = ("--claim", "data:/data", "run.dir=/data/runs")
    done = render(*asked, "model.base=fill", "method.init_from=/loras/a.safetensors")
    assert done.exit_code == 0 and yaml.safe_load(done.stdout)["kind"] == "JobSet"
    lines = done.stderr.splitlines()
    said = {line.split(":")[1].split()[0]: line.split("that is ")[1].split(",")[0] for line in lines}
    assert said == {
        "config": str(folder / "my.yaml"),
        "data.cache": str(folder / "cache" / "fill-lora"),
        "model.base": str(folder / "fill"),
        "method.init_from": "/loras/a.safetensors",
    }
    assert all(line.startswith("warning: ") for line in lines)


def test_pictures_are_read_by_pods_that_encode_while_they_train(folder: Path) -> None:
    asked = ("--claim", f"home:{folder}", "data.datasets.0.target=/after", "data.datasets.0.mask=masks")
    assert render(*asked).stderr == ""
    [line] = render(*asked, "data.mode=online", "data.encoder_devices=[cuda:7]").stderr.splitlines()
    assert line.startswith("warning: data.datasets /after: ")


def test_nothing_is_said_of_what_lies_on_claims_on_the_hub_or_at_a_url(folder: Path) -> None:
    claims = ("--claim", "runs:/runs", "--claim", f"home:{folder}")
    assert render(*claims, "run.dir=/runs").stderr == ""
    assert render(*claims, "run.dir=/runs", "data.cache=s3://b/c", "data.local_cache=/scratch").stderr == ""


def test_claims_are_read_with_their_mounts() -> None:
    longest = "a" * 253
    assert parse_claims(["data://data/", "a.b-1:/x/../y", f"{longest}:/z"]) == [
        ("data", "/data"),
        ("a.b-1", "/y"),
        (longest, "/z"),
    ]


@pytest.mark.parametrize("name", ["Data", "data_x", "-data", "data-", "a..b", ".a", "a" * 254, "d ata", "data\n", "é"])
def test_a_name_that_no_claim_can_have_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="RFC 1123"):
        parse_claims([f"{name}:/data"])


@pytest.mark.parametrize(
    "texts, message",
    [
        (["data"], "--claim data: write NAME:PATH"),
        (["data:"], "write NAME:PATH"),
        (["data:data"], "write NAME:PATH"),
        ([":/data"], "write NAME:PATH"),
        (["data:/data:ro"], "no colon"),
        (["data:/dev/shm"], "something else is mounted there"),
        (["data:/"], "would hide all that the image has"),
        (["data://data/.."], "would hide all that the image has"),
        (["a:/data", "b://data"], "something else is mounted there"),
        (["a:/data", "b:/data/"], "--claim b:/data/: something else is mounted there"),
    ],
)
def test_what_cannot_be_mounted_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_claims(texts)


def test_all_that_is_wrong_with_claims_is_said_at_once(folder: Path) -> None:
    done = render("--claim", "Data_X:/d", "--claim", "data")
    assert done.exit_code == 2 and "Data_X:/d" in done.stderr and "--claim data: write" in done.stderr
