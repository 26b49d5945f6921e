"""`fluxfill gpus` as a user types it."""

from typer.testing import CliRunner, Result

from configs.gpu_profiles import gpu_names, own_folder
from launch.cli import app
from launch.command import REPO_ROOT

LORA = str(REPO_ROOT / "configs" / "fill_lora.yaml")


def gpus(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["gpus", *arguments])


def test_the_list_has_every_profile_and_a_dash_for_what_a_card_has_not(machine) -> None:
    made = gpus("list")
    assert made.exit_code == 0
    rows = {line.split()[0]: line.split()[1:] for line in made.stdout.splitlines() if line.endswith("untested")}
    assert list(rows) == gpu_names()
    assert rows["h100-80gb"] == ["80", "989.5", "1979", "3350", "900", "400", "8", "untested"]
    assert rows["rtx3090-24gb"] == ["24", "71", "-", "936", "-", "-", "-", "untested"]


def test_a_detected_profile_is_listed_and_planned_by_its_name(machine) -> None:
    machine("NVIDIA H100 80GB HBM3", count=4, links=["26.562 GB/s"] * 18)
    printed = gpus("detect")
    assert printed.exit_code == 0 and not own_folder().exists()
    written = gpus("detect", "--write", "our-nodes")
    assert written.exit_code == 0 and "Take it by --gpu our-nodes" in written.stdout
    assert (own_folder() / "our-nodes.yaml").read_text() == printed.stdout
    assert "our-nodes*" in gpus("list").stdout
    planned = CliRunner().invoke(app, ["plan", LORA, "--gpu", "our-nodes"])
    assert planned.exit_code == 0 and "1 x 4 x NVIDIA H100 80GB HBM3" in planned.stdout
    again = gpus("detect", "--write", "our-nodes")
    assert again.exit_code == 2 and "is there already" in again.stderr


def test_rates_that_are_to_be_filled_in_are_named(machine) -> None:
    machine("NVIDIA H100 PCIe", count=2)
    made = gpus("detect", "--write", "pcie")
    assert made.exit_code == 0 and "bf16_tflops, memory_bandwidth_gb_s. Fill in" in made.stderr
    planned = CliRunner().invoke(app, ["plan", LORA, "--gpu", "pcie"])
    assert planned.exit_code == 2 and "its profile has no bf16_tflops" in planned.stderr


def test_without_a_gpu_it_ends_with_a_message(machine, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    made = gpus("detect")
    assert made.exit_code == 2 and "No GPU is here" in made.stderr and "Traceback" not in made.output


def test_a_name_that_is_none_or_taken_is_refused(machine) -> None:
    machine("NVIDIA H100 80GB HBM3")
    for name in ("../up", "a/b", "mine.yaml", ""):
        made = gpus("detect", "--write", name)
        assert made.exit_code == 2 and "write letters" in made.stderr
    assert "h100-80gb.yaml is there already" in gpus("detect", "--write", "h100-80gb").stderr
    assert not own_folder().exists()


def test_a_file_of_ones_own_that_is_wrong_is_named_after_the_others(machine) -> None:
    own_folder().mkdir(parents=True)
    (own_folder() / "bad.yaml").write_text("name: Bad\nmemory_gib: 0\n")
    made = gpus("list")
    assert made.exit_code == 2 and "bad.yaml:2: memory_gib is 0" in made.stderr
    assert "h100-80gb" in made.stdout and "bad*" not in made.stdout
