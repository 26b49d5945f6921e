import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.data_schema import EncodersConfig
from configs.errors import InputError
from data.encoders.encode import encode_captions
from data.encoders.load import find_device, load_encoders
from tests.payloads import canary_object

CAPTIONS = ["a cup of coffee on a table", "a quick brown fox jumps over the lazy dog", ""]


def test_auto_is_the_processor_where_there_is_no_gpu(tiny_model):
    encoders = load_encoders(tiny_model, EncodersConfig(), device_index=3)
    assert {part.device for part in (encoders.vae, encoders.text.clip, encoders.text.t5)} == {torch.device("cpu")}
    assert {encoders.vae.dtype, encoders.text.t5.dtype, encoders.text.clip.dtype} == {torch.float32}
    assert not encoders.text_has_its_own_device


def test_text_has_its_own_device_only_where_neither_encoder_shares_the_vaes(tiny_model):
    """On torch's meta device, which computes nothing but is not the CPU."""
    encoders = load_encoders(tiny_model, EncodersConfig(), device_index=0)
    encoders.vae.to("meta")
    assert encoders.text_has_its_own_device
    encoders.text.clip.to("meta")
    assert not encoders.text_has_its_own_device


@pytest.mark.parametrize("part", ["vae", "clip", "t5"])
def test_a_device_that_is_not_there_is_named(tiny_model, part, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(InputError, match=rf"data.encoders.{part} is cuda:1, but of CUDA devices there are here: none"):
        load_encoders(tiny_model, EncodersConfig(**{part: "cuda:1"}), device_index=0)
    with pytest.raises(InputError, match=rf"data.encoders.{part} is cuda, but of CUDA devices there are here: none"):
        load_encoders(tiny_model, EncodersConfig(**{part: "cuda"}), device_index=0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InputError, match=r"cuda:1, but of CUDA devices there are here: 1 \(cuda:0\)\. Name another"):
        load_encoders(
            tiny_model, EncodersConfig(**dict.fromkeys(("vae", "clip", "t5"), "cpu") | {part: "cuda:1"}), device_index=0
        )


def test_workers_of_a_machine_are_spread_over_its_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [find_device("vae", "auto", index).index for index in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [str(find_device("vae", "cuda", index)) for index in (2, 5)] == ["cuda:2", "cuda:1"]
    assert find_device("t5", "cuda:3", 0) == torch.device("cuda:3")
    assert find_device("t5", "cpu", 2) == torch.device("cpu")


def test_memory_that_runs_out_says_what_to_set(tiny_model, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("data.encoders.load.load_t5", full)
    with pytest.raises(InputError, match=r"do not fit the memory of cpu .*Set data.encoders.t5 to another device"):
        load_encoders(tiny_model, EncodersConfig(), device_index=0)


def test_int8_is_near_and_not_the_same(tiny_model):
    full = load_encoders(tiny_model, EncodersConfig(), device_index=0)
    int8 = load_encoders(tiny_model, EncodersConfig(t5_precision="int8"), device_index=0)
    expected, found = (encode_captions(encoders.text, CAPTIONS, text_length=32) for encoders in (full, int8))
    assert found.t5.dtype == torch.float32
    assert torch.equal(found.pooled, expected.pooled), "CLIP is as it was"
    assert not torch.equal(found.t5, expected.t5)
    similarity = torch.nn.functional.cosine_similarity(found.t5, expected.t5, dim=-1)
    assert similarity.min() > 0.99


@pytest.fixture
def model_copy(tiny_model, tmp_path):
    """A copy of the tiny model's encoders, to be damaged."""
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_model / part, tmp_path / "model" / part)
    return tmp_path / "model"


def load_all(model):
    load_encoders(model, EncodersConfig(vae="cpu", clip="cpu", t5="cpu"), device_index=0)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("damage", ["cut", "gone", "html"])
def test_damaged_weights_are_named(model_copy, part, damage):
    (weights,) = (model_copy / part).glob("*.safetensors")
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1000] if damage == "cut" else b"<!DOCTYPE html>")
    with pytest.raises(InputError, match=rf"model/{part}: cannot be loaded \(.*Fetch the model again"):
        load_all(model_copy)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
def test_weights_that_are_missing_are_not_made_up(model_copy, part):
    (weights,) = (model_copy / part).glob("*.safetensors")
    tensors = load_file(weights)
    missing = next(name for name in sorted(tensors) if "layer" in name or "block" in name)
    del tensors[missing]
    save_file(tensors, weights, metadata={"format": "pt"})
    name = missing.removeprefix("text_model.")  # transformers reads FLUX.1's CLIP without its wrapper
    with pytest.raises(InputError, match=rf"model/{part}: weights are missing \({re.escape(name)}; 1 in all\)"):
        load_all(model_copy)


@pytest.mark.fault(27, "a pickle in the place of a model's safetensors, as .bin")
@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_pickled_weights_are_not_read(model_copy, tmp_path, monkeypatch, part, suffix):
    """Not even by a reader that takes tensors alone."""
    canary = tmp_path / "canary"
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("a pickle was read"))
    (weights,) = (model_copy / part).glob("*.safetensors")
    pickled = "pytorch_model.bin" if part != "vae" else "diffusion_pytorch_model.bin"
    tensors = load_file(weights)
    weights.unlink()
    torch.save(tensors | {"extra": canary_object(canary)}, weights if suffix != ".bin" else weights.with_name(pickled))
    with pytest.raises(InputError, match=rf"model/{part}: cannot be loaded"):
        load_all(model_copy)
    assert not canary.exists()


@pytest.mark.fault(27, "a tokenizer's folder with a program of its own")
@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_programs_in_a_models_folder_are_not_run(model_copy, tmp_path, part):
    canary = tmp_path / "canary"
    (model_copy / part / "own.py").write_text(f"open({str(canary)!r}, 'w')\nclass Own: pass\n")
    path = model_copy / part / "tokenizer_config.json"
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    (model_copy / part / "config.json").write_text(json.dumps({"model_type": "own", **settings}))
    with pytest.raises(InputError, match=rf"model/{part}: cannot be loaded"):
        load_all(model_copy)
    assert not canary.exists()


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_an_empty_tokenizer_is_named(model_copy, part):
    for path in (model_copy / part).iterdir():
        path.unlink()
    with pytest.raises(InputError, match=rf"model/{part}: cannot be loaded"):
        load_all(model_copy)


def test_a_vae_of_another_model_is_refused(model_copy):
    config = model_copy / "vae" / "config.json"
    text = config.read_text()
    assert '"shift_factor"' in text
    lines = [line for line in text.splitlines() if "shift_factor" not in line]
    config.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"model/vae: 16 latent channels, shift_factor None; FLUX.1 has 16"):
        load_all(model_copy)
