"""Each program's file, read by that program's rules, gives what the trained model gives."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import PeftModel
from safetensors.torch import load_file

from tests.trainer.adapters.live_models import METHODS, adapted, assert_same_output, lora, velocity_of
from tests.trainer.adapters.other_trainers import BLOCK_TARGETS, OUTSIDE_TARGETS
from tests.trainer.export.comfyui import patch
from tests.trainer.export.made_checkpoints import make_checkpoint
from trainer.adapters.files import adapter_tensors
from trainer.adapters.read import read_adapter
from trainer.export.adapter_formats import kohya_tensors
from trainer.export.formats import usage_in_diffusers, write_format
from trainer.export.trained import open_trained
from trainer.model.flux import load_transformer

EVERYTHING = lora(targets=BLOCK_TARGETS + OUTSIDE_TARGETS)
SOME = {"lora": lora(alpha=12), "dora": METHODS["dora"], "lokr": METHODS["lokr-low-rank"]}
SOME["lokr-whole"] = METHODS["lokr-whole"]


@pytest.fixture
def written(tmp_path):
    """written(model, method, form): (the folder of that format, the live model)."""

    def write(model, method, form, *, expanded=False, dtype=torch.float32):
        checkpoint, live = make_checkpoint(model, method, tmp_path / "run", expanded=expanded)
        out = tmp_path / form
        out.mkdir()
        write_format(open_trained(checkpoint, "live"), out, form, dtype, {})
        return out, live

    return write


@pytest.mark.parametrize("method", SOME.values(), ids=SOME)
def test_comfyui_reads_it(tiny_model, written, rows, method):
    out, live = written(tiny_model, method, "comfyui")
    patched = patch(load_transformer(tiny_model, dtype=torch.float32), out / "run.safetensors")
    assert_same_output(velocity_of(patched, rows), velocity_of(live, rows))


# Of rank 320 every layer has the rank that the input layer has in any case.
OF_DEV = {"lora": lora(), "dora": METHODS["dora"]}
OF_DEV |= {f"{kind}-320": method.model_copy(update={"rank": 320}) for kind, method in OF_DEV.items()}


@pytest.mark.parametrize("method", OF_DEV.values(), ids=OF_DEV)
def test_comfyui_widens_a_dev_for_it(tiny_dev_model, written, rows, method):
    out, live = written(tiny_dev_model, method, "comfyui", expanded=True)
    dev = FluxTransformer2DModel.from_pretrained(tiny_dev_model, subfolder="transformer")
    assert dev.x_embedder.in_features == 64
    assert_same_output(velocity_of(patch(dev, out / "run.safetensors"), rows), velocity_of(live, rows))


@pytest.mark.parametrize("rank", [4, 320])
@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_each_form_tells_that_it_is_of_an_expanded_dev(tiny_dev_model, tiny_model, written, form, rank):
    out, live = written(tiny_dev_model, lora(rank=rank), form, expanded=True)
    (file,) = out.glob("*.safetensors")
    if form == "kohya":
        assert load_file(file)["lora_unet_img_in.reshape_weight"].tolist() == [192, 384]
    saved = read_adapter(file, load_transformer(tiny_model, dtype=torch.float32))
    assert saved.widens_input and saved.layers["x_embedder"]["lora_A"].shape == (320, 384)
    assert '"black-forest-labs/FLUX.1-dev"' in usage_in_diffusers(live)


@pytest.mark.parametrize("method", [*SOME.values(), EVERYTHING], ids=[*SOME, "everything"])
def test_peft_reads_its_folder(tiny_model, written, rows, method):
    out, live = written(tiny_model, method, "peft")
    read = PeftModel.from_pretrained(load_transformer(tiny_model, dtype=torch.float32), out)
    assert_same_output(velocity_of(read, rows), velocity_of(live, rows))


@pytest.mark.parametrize(
    "method",
    [EVERYTHING, lora(targets=["to_q", "to_v", "proj_mlp"]), lora(targets=["to_k"])],
    ids=["everything", "some of what is one layer there", "one"],
)
def test_to_kohyas_keys_and_back_every_number_is_the_same(tiny_model, written, method):
    out, live = written(tiny_model, method, "kohya")
    names = load_file(out / "run.safetensors").keys()
    assert all(name.startswith("lora_unet_") and "to_q" not in name for name in names)
    saved = read_adapter(out / "run.safetensors", load_transformer(tiny_model, dtype=torch.float32))
    found = {f"{layer}.{role}.weight": tensor for layer, held in saved.layers.items() for role, tensor in held.items()}
    expected = adapter_tensors(live)
    assert found.keys() == expected.keys() and saved.problems == []
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


TARGET_SETS = {"attention": "attention", "attention+mlp": "attention+mlp", "one part": ["to_k"]}
TARGET_SETS |= {"some parts": ["to_q", "add_v_proj", "proj_mlp"], "all": BLOCK_TARGETS + OUTSIDE_TARGETS}


@pytest.mark.parametrize("targets", TARGET_SETS.values(), ids=TARGET_SETS)
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_every_tensor_is_of_the_dtype_asked_for(tiny_model, tmp_path, kind, targets):
    """But for alphas, which are numbers that bf16 has not all of."""
    method = type(SOME[kind]).model_validate(SOME[kind].model_dump() | {"targets": targets})
    checkpoint, _ = make_checkpoint(tiny_model, method, tmp_path / "run")
    trained = open_trained(checkpoint, "live")
    for dtype in (torch.bfloat16, torch.float32):
        for form in ("diffusers", "comfyui", "peft", *(() if kind == "dora" else ("kohya",))):
            out = tmp_path / form / str(dtype)
            out.mkdir(parents=True)
            write_format(trained, out, form, dtype, {})
            (file,) = out.glob("*.safetensors")
            tensors = load_file(file)
            others = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype != dtype}
            assert {name.rpartition(".")[2] for name in others} <= {"alpha"}, (form, others)
            assert set(others.values()) <= {torch.float32}


def test_a_lora_that_has_not_trained_goes_to_kohyas_keys_too(tiny_model):
    live = adapted(tiny_model, lora(targets=["to_q", "to_k"]))
    plain = load_transformer(tiny_model, dtype=torch.float32)
    layers = {}
    for name, tensor in adapter_tensors(live).items():
        layer, _, role = name.removesuffix(".weight").rpartition(".")
        layers.setdefault(layer, {})[role] = tensor
    tensors = kohya_tensors(plain, layers, widens_input=False)
    assert tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (576, 8)
    assert not any(tensor.any() for name, tensor in tensors.items() if "lora_up" in name)


def test_lycoris_finds_its_names_and_alpha(tiny_model, written):
    """Its layers are called with underscores; without an alpha it makes none of them."""
    out, live = written(tiny_model, METHODS["lokr-low-rank"], "kohya")
    found = load_file(out / "run.safetensors")
    expected = adapter_tensors(live)
    layers = {name.rpartition(".")[0] for name in expected}
    assert {f"lycoris_{layer.replace('.', '_')}.alpha" for layer in layers} <= found.keys()
    for name, tensor in expected.items():
        layer, _, role = name.rpartition(".")
        assert torch.equal(found[f"lycoris_{layer.replace('.', '_')}.{role}"], tensor)


def test_what_changes_a_weight_is_read_back_in_bf16(tiny_model, written):
    out, _ = written(tiny_model, METHODS["dora"], "comfyui", dtype=torch.bfloat16)
    found = load_file(out / "run.safetensors")
    assert found and all(name.endswith(".diff") and t.dtype == torch.bfloat16 for name, t in found.items())
