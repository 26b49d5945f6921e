import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from data.storage.checkpoint_folders import step_of
from tests.trainer.adapters.live_models import lora
from tests.trainer.export.made_checkpoints import WHOLE, make_checkpoint
from trainer.adapters.files import WEIGHTS_NAME
from trainer.checkpoints.find import find_checkpoint
from trainer.checkpoints.folders import MANIFEST
from trainer.checkpoints.tensor_files import StateFiles
from trainer.evaluation.tuned_model import (
    TunedModel,
    TunedSource,
    find_checkpoints,
    find_source,
    refuse_other_weights,
)
from trainer.export.from_checkpoint import export_checkpoint
from trainer.model.flux import load_transformer

ROOT = Path(__file__).resolve().parents[3]

CPU = torch.device("cpu")


@torch.no_grad()
def velocity(transformer) -> torch.Tensor:
    """Of a fixed small input."""
    config, random = transformer.config, torch.Generator().manual_seed(0)
    return transformer(
        hidden_states=torch.randn(1, 4, config.in_channels, generator=random),
        encoder_hidden_states=torch.randn(1, 8, config.joint_attention_dim, generator=random),
        pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=random),
        timestep=torch.full((1,), 0.5),
        guidance=torch.full((1,), 30.0),
        img_ids=torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]),
        txt_ids=torch.zeros(8, 3),
        return_dict=False,
    )[0]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_are_exchanged_in_place_and_the_base_comes_back(train_run, tiny_model, method):
    source = find_source(train_run(method))
    model, base = TunedModel(source, CPU), velocity(load_transformer(tiny_model, dtype=torch.float32))
    assert torch.allclose(velocity(model.transformer), base, atol=1e-5)
    found = {}
    for folder in find_checkpoints(source):
        for weights in ("live", "ema"):
            model.load_checkpoint(folder, weights)
            found[step_of(folder), weights] = velocity(model.transformer)
    assert [*found] == [(1, "live"), (1, "ema"), (2, "live"), (2, "ema")]
    # At step 1 the average is still the weights themselves, or lies between the base's and them.
    assert not torch.allclose(found[1, "live"], found[2, "live"], atol=1e-4)
    assert not torch.allclose(found[2, "live"], found[2, "ema"], atol=1e-5)
    model.load_base()
    assert torch.allclose(velocity(model.transformer), base, atol=1e-5)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_the_run_exported_fills_as_its_last_checkpoint_does(train_run, method):
    run = train_run(method)
    source = find_source(run)
    model = TunedModel(source, CPU)
    model.load_checkpoint(find_checkpoint(source.path))
    for place in (run / "final", *([run / "final" / WEIGHTS_NAME] if method == "lora" else [])):
        exported = find_source(place)
        assert exported.run is None and exported.config is not None  # that of the run beside it
        assert torch.allclose(velocity(TunedModel(exported, CPU).transformer), velocity(model.transformer), atol=1e-4)


def test_an_adapter_alone_needs_its_base_named(train_run, tiny_model, tmp_path):
    shutil.copytree(train_run("lora") / "final", tmp_path / "adapter")
    with pytest.raises(InputError, match="Give --base"):
        find_source(tmp_path / "adapter")
    source = find_source(tmp_path / "adapter", base=str(tiny_model))
    file = tmp_path / "adapter" / WEIGHTS_NAME
    assert source == TunedSource(tmp_path / "adapter", tiny_model, adapter=file, weights="live")
    file.write_bytes(b"no adapter")
    with pytest.raises(InputError, match="cannot be read"):
        find_source(file, base=str(tiny_model))
    with pytest.raises(InputError, match="cannot be put on its base"):
        TunedModel(source, CPU)


@pytest.mark.parametrize(
    "method, form, weights",
    [
        (lora(), "diffusers", "live"),
        (lora(), "comfyui", "ema"),
        (lora(), "peft", "live"),
        (lora(), "kohya", "live"),
        (lora(), "merged", "ema"),
        (WHOLE, "diffusers", "live"),
    ],
)
def test_an_export_says_itself_with_which_guidance_it_fills(tiny_model, tmp_path, caplog, method, form, weights):
    """Also beside the config of another run."""
    checkpoint, _ = make_checkpoint(tiny_model, method, tmp_path / "sofa")
    other = (checkpoint / "config.yaml").read_text()
    assert other.count("guidance: 30.0") == 1
    (checkpoint / "config.yaml").write_text(other.replace("guidance: 30.0", "guidance: 12.3456789"))
    (checkpoint / MANIFEST).write_text("{}")
    out = tmp_path / "elsewhere" / "export"
    export_checkpoint(checkpoint, out, form=form, weights=weights)
    place = out if (out / "model_index.json").is_file() else next(out.glob("*.safetensors"))
    for text in (None, other):
        if text is not None:
            (out.parent / "config.yaml").write_text(text)
        source = find_source(place, base=str(tiny_model))
        assert (source.flow.guidance, source.weights) == (12.3456789, weights)
    assert "guidance" not in caplog.text


@pytest.mark.parametrize("has_config", [True, False])
def test_where_no_metadata_tells_the_guidance_the_config_does_and_else_an_assumption_is_told(
    train_run, tiny_model, tmp_path, caplog, monkeypatch, has_config
):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    caplog.set_level(logging.INFO, logger="fluxfill")
    shutil.copytree(train_run("lora") / "final", tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS_NAME
    save_file(load_file(file), file)
    if has_config:
        config = (train_run("lora") / "config.yaml").read_text().replace("guidance: 30.0", "guidance: 4.0")
        (tmp_path / "config.yaml").write_text(config)
    assert find_source(file, base=str(tiny_model)).flow.guidance == (4.0 if has_config else 30.0)
    words = "does not say with what guidance it was trained; 30 is assumed"
    assert (words in caplog.text) == (not has_config)


@pytest.mark.parametrize("is_another", [False, True])
def test_an_adapter_on_another_base_than_its_own_is_told(
    train_run, tiny_model, tmp_path, caplog, monkeypatch, is_another
):
    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    base = shutil.copytree(tiny_model, tmp_path / "other")
    (base / "transformer" / "notes.txt").write_text("of the same weights")
    if is_another:
        (file,) = (base / "transformer").glob("*.safetensors")
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    find_source(train_run("lora") / "final", base=str(base))
    assert ("was trained on another base than" in caplog.text) == is_another


def test_a_guidance_that_is_none_is_told(train_run, tiny_model, tmp_path):
    file = tmp_path / "adapter.safetensors"
    save_file(load_file(train_run("lora") / "final" / WEIGHTS_NAME), file, {"fluxfill.guidance": "-1"})
    with pytest.raises(InputError, match=r"says fluxfill.guidance '-1', which is none\. Export it again"):
        find_source(file, base=str(tiny_model))


@pytest.mark.parametrize("weights, refused", [("live", False), ("ema", True)])
def test_an_export_has_no_other_average_than_its_own(train_run, weights, refused):
    final, average = (find_source(train_run("lora") / name) for name in ("final", "final-ema"))
    refuse_other_weights(average, None, weights)
    if not refused:
        refuse_other_weights(final, None, weights)
        return
    with pytest.raises(InputError, match=r"is an export, which holds one kind \(live\)\. Leave --weights out"):
        refuse_other_weights(final, None, weights)


def test_an_adapter_of_expanded_dev_fills_alike_from_checkpoint_and_export_whatever_the_others_ranks(
    tiny_dev_model, tmp_path
):
    checkpoint, live = make_checkpoint(tiny_dev_model, lora(rank=320), tmp_path / "run", expanded=True)
    export_checkpoint(checkpoint, tmp_path / "out")
    model = TunedModel(find_source(checkpoint), CPU)
    model.load_checkpoint(checkpoint)
    exported = TunedModel(find_source(tmp_path / "out", base=str(tiny_dev_model)), CPU)
    for tuned in (model, exported):
        assert torch.allclose(velocity(tuned.transformer), velocity(live), rtol=1e-4, atol=1e-4)


def test_a_step_that_is_not_there_is_told_with_those_that_are(train_run):
    source = find_source(train_run("full"))
    with pytest.raises(InputError, match=r"has no checkpoint of step 7\. There are 1, 2"):
        find_checkpoints(source, [2, 7])
    assert [step_of(folder) for folder in find_checkpoints(source, [2, 1, 2])] == [1, 2]
    with pytest.raises(InputError, match="an export has no steps"):
        find_checkpoints(find_source(train_run("full") / "final"), [1])


def copy_of(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns("final*")))


def test_a_half_written_checkpoint_is_refused_and_none_that_is_whole_is_taken_for_it(train_run, tmp_path):
    run = copy_of(train_run("lora"), tmp_path / "run")
    half = run / "checkpoints" / "step-00000002"
    (half / "COMPLETE").unlink()
    with pytest.raises(InputError, match="half-written"):
        find_checkpoints(find_source(run), [2])
    with pytest.raises(InputError, match="half-written"):
        find_source(half)
    assert step_of(find_checkpoint(run)) == 1
    (run / "checkpoints" / "step-00000001" / "COMPLETE").unlink()
    with pytest.raises(InputError, match="no complete checkpoint yet"):
        find_source(run)


def test_a_damaged_checkpoint_is_named_and_passed_over_where_none_was_named(train_run, tmp_path):
    run = copy_of(train_run("lora"), tmp_path / "run")
    file = run / "checkpoints" / "step-00000002" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"does not match its sha256\. Take another step"):
        find_checkpoints(find_source(run), [2])
    assert step_of(find_checkpoint(run)) == 1


def test_a_checkpoint_is_a_source_of_its_own(train_run):
    folder = train_run("lora") / "checkpoints" / "step-00000001"
    source = find_source(folder)
    assert find_checkpoints(source) == [folder] == [find_checkpoint(source.path)]
    assert source.config.run.name == "lora"


def test_what_is_none_of_these_is_told(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        find_source(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is no run, checkpoint or export"):
        find_source(tmp_path)


def test_a_run_that_has_saved_nothing_yet_is_told_so(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="has no complete checkpoint yet"):
        find_source(tmp_path)


def test_an_exported_adapter_is_loaded_without_a_word_of_diffusers(train_run, tmp_path):
    script = (
        "from configs.library_warnings import quiet_libraries; quiet_libraries(); "
        "from pathlib import Path; import torch; "
        "from trainer.evaluation.tuned_model import TunedModel, find_source; "
        f"TunedModel(find_source(Path({str(train_run('lora') / 'final')!r})), torch.device('cpu'))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert said.stderr == ""


def test_weights_of_another_model_are_refused(train_run):
    lora, full = (find_source(train_run(method)) for method in ("lora", "full"))
    model = TunedModel(lora, CPU)
    with pytest.raises(InputError, match="trained another model"):
        model.load_checkpoint(find_checkpoint(full.path))


def test_a_run_without_an_average_has_none(train_run, monkeypatch):
    source = find_source(train_run("lora"))
    monkeypatch.setattr(StateFiles, "kinds", lambda self: {"weight"})
    with pytest.raises(InputError, match="Give --weights live"):
        TunedModel(source, CPU).load_checkpoint(find_checkpoint(source.path), "ema")


def test_the_live_weights_are_those_of_the_export(train_run):
    run = train_run("full")
    model = TunedModel(find_source(run), CPU)
    model.load_checkpoint(run / "checkpoints" / "step-00000002")
    stored = load_file(run / "final/transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.transformer.named_parameters())
