"""Version 1 of checkpoints stays readable. format_v1/ holds one that was saved before state.json had a version; nobody
rewrites it.

A LoRA of rank 2 on every to_v of the demo's model, alpha 8, lr 1e-2, average 0.9, by one process: step 4 of 8. Beside
it stand the losses of the undisturbed run, and the norms over its tensors at step 8.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from configs.errors import InputError
from tests.payloads import canary_pickle
from tests.ranks import run_ranks
from trainer.checkpoints.folders import find_damage
from trainer.checkpoints.run_state import read_state
from trainer.checkpoints.tensor_files import StateFiles

FOLDER = Path(__file__).parent / "format_v1"
STEP = "step-00000004"


@pytest.fixture
def old(tmp_path) -> Path:
    """A copy of the checkpoint in the folder of a run."""
    return Path(shutil.copytree(FOLDER / STEP, tmp_path / "version-1" / "checkpoints" / STEP))


def edit(checkpoint: Path, name: str, change: Callable[[str], str]) -> None:
    """Change a text file of a checkpoint, and its sha256 in the manifest."""
    data = change((checkpoint / name).read_text(encoding="utf-8")).encode()
    (checkpoint / name).write_bytes(data)
    hashes = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(hashes | {name: hashlib.sha256(data).hexdigest()}))


def train(arguments: list[str]) -> int:
    from trainer.main import train

    return train(arguments)


@pytest.mark.fault(27, "pickles in the place of each file of a checkpoint, with their hashes in its manifest")
@pytest.mark.parametrize("name", ["state.json", "index.json", "rank-00000.safetensors", "manifest.json"])
def test_a_pickle_in_the_place_of_a_file_is_not_read(old, tmp_path, name):
    canary = tmp_path / "canary"
    pickled = canary_pickle(canary)
    (old / name).write_bytes(pickled)
    if name != "manifest.json":
        hashes = json.loads((old / "manifest.json").read_text())
        hashes[name] = hashlib.sha256(pickled).hexdigest()
        (old / "manifest.json").write_text(json.dumps(hashes))
    assert (find_damage(old) is None) == (name != "manifest.json")
    read = {"state.json": read_state, "manifest.json": lambda _: json.loads((old / name).read_text())}
    with pytest.raises((ValueError, SafetensorError)):
        read.get(name, lambda folder: StateFiles(folder).read_bound(0))(old)
    assert not canary.exists()


@pytest.mark.fault(27, "a checkpoint that names files outside of its folder")
@pytest.mark.parametrize("outside", ["../../elsewhere", "/dev/zero", "a/../../../b"])
def test_a_checkpoint_names_nothing_outside_of_its_folder(old, outside):
    edit(old, "index.json", lambda text: text.replace("rank-00000.safetensors", outside))
    files = StateFiles(old)
    kind, parameter = files.names()[0].split("/", 1)
    with pytest.raises(InputError, match=r"index\.json: names .*, which is no rank's file"):
        files.read(kind, parameter, 0, 1)
    hashes = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps({outside: "0" * 64, **hashes}))
    assert find_damage(old) == f"manifest.json names {outside}, which lies outside"


def test_it_has_no_version():
    assert json.loads((FOLDER / STEP / "state.json").read_text()).keys() == {"state", "engine"}


def test_a_run_goes_on_from_it_as_if_nothing_had_been(old, config, samples, tmp_path):
    from configs.loading import dump_config
    from trainer.checkpoints.tensor_files import StateFiles
    from trainer.training_data import choose_order

    shards = choose_order(config, samples).shards  # these hang on the versions of the libraries that wrote the model

    def of_todays_cache(text: str) -> str:
        saved = json.loads(text)
        saved["state"]["order"]["shards"] = shards
        return json.dumps(saved)

    edit(old, "state.json", of_todays_cache)
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    settings = ["method={type: lora, rank: 2, alpha: 8, targets: [to_v]}", "train.lr=1e-2", "train.ema_decay=0.9"]
    settings += ["train.steps=8", "train.warmup_steps=3", "train.global_batch_size=8", "train.micro_batch_size=3"]
    settings += ["validation.every_steps=null", "checkpoint.every_steps=null", "logging.trackers=[]"]
    place = ["--config", str(tmp_path / "config.yaml"), f"run.dir={tmp_path}", "run.name=version-1"]
    run_ranks("single", 1, train, [*place, *settings])

    run = tmp_path / "version-1"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = json.loads((FOLDER / "losses.json").read_text())
    assert [line["step"] for line in lines] == [5, 6, 7, 8]
    for line in lines:
        assert line["loss"] == pytest.approx(expected[str(line["step"])]["loss"], rel=1e-5)
    files = StateFiles(run / "checkpoints" / "step-00000008")
    norms = {kind: [] for kind in files.kinds()}
    for name in files.names():
        kind, parameter = name.split("/", 1)
        norms[kind].append(files.read(kind, parameter, 0, files.sizes[parameter]).norm())
    norms = {kind: torch.stack(parts).norm().item() for kind, parts in norms.items()}
    assert norms == pytest.approx(json.loads((FOLDER / "step-8-norms.json").read_text()), rel=1e-5)


def test_it_is_exported(old, tiny_model, tmp_path):
    """Its config.yaml still names keys that are gone since."""
    from trainer.export.from_checkpoint import export_checkpoint

    edit(old, "config.yaml", lambda text: text.replace("/tmp/fixture/models0/tiny-fill", str(tiny_model)))
    export_checkpoint(old, tmp_path / "out")
    stored = load_file(FOLDER / STEP / "adapter" / "pytorch_lora_weights.safetensors")
    exported = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
