"""One error planted for every check: it is found, named and ends with exit code 2, and nothing else is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from launch.gpus import Gpu


def states(checks: list[dict]) -> set[str]:
    return {check["state"] for check in checks}


def test_a_right_config_has_only_ok_lines_and_changes_nothing_but_the_scan(check, folder):
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    code, checks = check()
    assert code == 0 and states(checks) == {"ok"}, checks
    names = ["config", "python", "packages", "gpus", "processes", "paths", "model", "transformer", "pictures"]
    names += ["captions", "buckets", "cache", "method", "disk", "memory"]
    assert list(dict.fromkeys(made["name"] for made in checks)) == names
    new = {path for path in folder.rglob("*") if path.is_file()} - set(before)
    assert new and all(path.is_relative_to(folder / "cache" / "scan") for path in new)


def drop_mask(folder: Path) -> None:
    min((folder / "mask").glob("*.png")).unlink()


def blacken_mask(folder: Path) -> None:
    path = min((folder / "mask").glob("*.png"))
    Image.new("L", Image.open(path).size).save(path)


def cut_off_target(folder: Path) -> None:
    path = min((folder / "target").glob("*.png"))
    path.write_bytes(path.read_bytes()[:40])


def resize_source(folder: Path) -> None:
    path = min((folder / "source").glob("*.png"))
    Image.open(path).resize((40, 40)).save(path)


def swap_sources_and_targets(folder: Path) -> None:
    (folder / "source").rename(folder / "x")
    (folder / "target").rename(folder / "source")
    (folder / "x").rename(folder / "target")


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_in_channels(folder: Path) -> None:
    rewrite(folder / "model/transformer/config.json", in_channels=128)


def break_vae(folder: Path) -> None:
    rewrite(folder / "model/vae/config.json", latent_channels=4)


def cut_off_weights(folder: Path) -> None:
    path = folder / "model/transformer/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tokenizer(folder: Path) -> None:
    (folder / "model/tokenizer/merges.txt").unlink()


def drop_part(folder: Path) -> None:
    shutil.rmtree(folder / "model/text_encoder_2")


def leave_other_cache(folder: Path) -> None:
    (folder / "cache").mkdir()
    (folder / "cache/manifest.json").write_text("{}")


@pytest.mark.parametrize(
    "plant, name, words",
    [
        (drop_mask, "names", "no mask of the same name"),
        (blacken_mask, "masks", "the mask is all black"),
        (cut_off_target, "unreadable", "target"),
        (resize_source, "sizes", "the source is 40x40"),
        (break_in_channels, "transformer", "128 input channels"),
        (break_vae, "encoders", "4 latent channels"),
        (cut_off_weights, "weights", "cut off"),
        (drop_tokenizer, "tokenizers", "no tokenizer.json, or vocab.json and merges.txt"),
        (drop_part, "model", "lacks text_encoder_2"),
        (leave_other_cache, "cache", "manifest.json: damaged"),
    ],
)
def test_what_is_wrong_with_files_is_found(
    plant: Callable[[Path], None], name: str, words: str, check: Callable, folder: Path
) -> None:
    plant(folder)
    code, checks = check()
    errors = [made for made in checks if made["state"] == "error"]
    assert code == 2 and len(errors) == 1, errors
    assert errors[0]["name"] == name and words in errors[0]["what"] and errors[0]["cure"]


@pytest.mark.parametrize(
    "arguments, name, words",
    [
        (["train.stps=3"], "config", "train.stps is 3, but there is no such key"),
        (["parallel.engine=single", "--num-processes", "2"], "config", "is one process, but 2 are asked for"),
        (["parallel.engine=zero2", "train.optimizer=adafactor"], "config", "do not go together"),
        (["run.dir=/proc/nowhere"], "paths", "nothing can be written in /proc"),
        (["method={type: lora, init_from: /nowhere.safetensors}"], "paths", "there is no such file"),
        (["data.datasets.0.mask=/nowhere/mask"], "lists", "/nowhere/mask"),
        (["data.holdout=64"], "pictures", "leaves none to train on"),
        (["model.base=/nowhere/model"], "model", "no such folder"),
        (["data.preprocess=never"], "cache", "data.preprocess is never"),
        (["method={type: lora, targets: [to_q, to_query]}"], "method", "no linear layer is called to_query"),
    ],
)
def test_what_is_wrong_with_a_config_is_found(arguments: list[str], name: str, words: str, check: Callable) -> None:
    code, checks = check(*arguments)
    errors = [made for made in checks if made["state"] == "error"]
    assert code == 2 and [made["name"] for made in errors] == [name], errors
    assert words in errors[0]["what"] and errors[0]["cure"]


def test_every_error_is_told_at_once(check, folder):
    drop_mask(folder)
    break_vae(folder)
    code, checks = check("run.dir=/proc/nowhere", "data.preprocess=never")
    assert code == 2
    assert [made["name"] for made in checks if made["state"] == "error"] == ["paths", "encoders", "names", "cache"]


def test_a_gpu_that_is_too_small_is_an_error_with_the_sum(check, monkeypatch):
    card = Gpu(0, "NVIDIA Tiny", 1.0, 0.0, "580.1", (9, 0))
    monkeypatch.setattr("launch.check.run.list_gpus", lambda environment: [card])
    monkeypatch.setattr("launch.check.run.check_gpus", lambda gpus: [])  # torch's build here is a CPU's
    code, checks = check()
    (memory,) = [made for made in checks if made["name"] == "memory" and "training" in made["what"]]
    assert code == 2 and memory["state"] == "error" and "of 1.0 GiB" in memory["what"]
    assert any("CUDA's context" in line for line in memory["found"])


def test_a_run_without_its_pictures_is_checked_by_its_finished_cache(check, cache, folder):
    shutil.copytree(cache.folder, folder / "cache")
    shutil.rmtree(folder / "target")
    code, checks = check("data.holdout=48")
    assert code == 0 and states(checks) == {"ok"}, checks
    said = {made["name"]: made["what"] for made in checks}
    assert "not on this machine" in said["pictures"] and "96 samples" in said["cache"]


def test_a_token_in_a_config_is_not_printed(check):
    tar = "https://127.0.0.1:9/a.tar?sig=TOPSECRET"
    _, checks = check(f"data.datasets.0={{name: photographs, tars: '{tar}', mask: null}}", "data.hf_token=TOPSECRET")
    assert "data.hf_token" in str(checks) and "TOPSECRET" not in str(checks)
