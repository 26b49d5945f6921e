"""A file is read rightly if the model with it computes what the base does with the file's weights added by hand."""

import json
import re

import pytest
import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from peft import LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from configs.schema import DoraConfig, LokrConfig
from tests.payloads import canary_object
from tests.trainer.adapters.live_models import (
    NO_TEXT,
    adapted,
    assert_same_output,
    lora,
    train_a_little,
    velocity_of,
)
from tests.trainer.adapters.other_trainers import (
    BLOCK_TARGETS,
    BLOCKS,
    OUTSIDE,
    OUTSIDE_TARGETS,
    WIDTH,
    changes_of,
    merged,
    random_lora,
    rows_of,
    write_lora,
)
from trainer.adapters.files import save_adapter
from trainer.adapters.read import find_adapter_file, read_adapter
from trainer.model.flux import load_transformer

EVERYTHING = lora(rank=4, alpha=4, targets=BLOCK_TARGETS + OUTSIDE_TARGETS)
IN_BLOCKS = lora(rank=4, alpha=4, targets=BLOCK_TARGETS)
PEFT = ("lora_A", "lora_B")

# Program -> how it names BFL's layers.
FORMATS = {
    "sd-scripts": {"prefix": "lora_unet_", "flat": True},
    "ComfyUI": {"prefix": "diffusion_model."},
    "ComfyUI, peft's factors": {"prefix": "diffusion_model.", "factors": PEFT},
    "peft on BFL's code": {"prefix": "base_model.model.", "factors": PEFT},
    "BFL": {"prefix": "", "factors": PEFT},
}


def velocity_from(model, method, source, rows):
    return velocity_of(adapted(model, method.model_copy(update={"init_from": source})), rows)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_lora_of_every_layer_by_bfls_names(tiny_model, tmp_path, rows, pipeline, form):
    """Fused q, k and v, the swapped halves of the last modulation, and an alpha that is not the rank."""
    made = random_lora(BLOCKS | OUTSIDE, alpha=3.0)
    expected = velocity_of(merged(tiny_model, changes_of(made)), rows)
    file = write_lora(made, tmp_path / "lora.safetensors", **form)
    assert_same_output(velocity_from(tiny_model, EVERYTHING, file, rows), expected)
    assert (expected - velocity_of(pipeline.transformer, rows)).abs().max() > 0.1


def test_the_real_widths_are_cut_as_diffusers_cuts_them(tmp_path):
    """Against diffusers' converter of sd-scripts' files, which knows FLUX.1's own width alone."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    generator = torch.Generator().manual_seed(3)
    shapes = {"double_blocks_0_txt_attn_qkv": (9216, 3072), "single_blocks_0_linear1": (21504, 3072)}
    shapes["single_blocks_0_linear2"] = (3072, 15360)
    tensors = {}
    for name, (outputs, inputs) in shapes.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(outputs, 2, generator=generator)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    expected = FluxFillPipeline.lora_state_dict(dict(tensors))
    save_file(tensors, tmp_path / "kohya.safetensors")
    found = read_adapter(tmp_path / "kohya.safetensors", flux).layers
    assert {f"transformer.{layer}.lora_{part}.weight" for layer in found for part in "AB"} == expected.keys()
    for layer, factors in found.items():
        a, b = (expected[f"transformer.{layer}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(factors["lora_B"] @ factors["lora_A"], b @ a)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_diffusers_own_reader_does_not_do(tiny_model, tmp_path, rows, form):
    """Why there is another one. Should it do one day, in every width: take it, and this test away."""
    made = random_lora(BLOCKS | OUTSIDE, alpha=3.0)
    file = write_lora(made, tmp_path / "lora.safetensors", **form)
    fresh = FluxFillPipeline.from_pretrained(tiny_model, **NO_TEXT)
    try:
        fresh.load_lora_weights(file)
    except (AssertionError, KeyError, ValueError, RuntimeError):
        return
    expected = velocity_of(merged(tiny_model, changes_of(made)), rows)
    assert (velocity_of(fresh.transformer, rows) - expected).abs().max() > 0.1


def test_diffusers_converter_loses_alpha_prefix_and_magnitudes(tmp_path):
    made = random_lora({layer: OUTSIDE[layer] for layer in ("txt_in", "final_layer.linear")}, alpha=1.0)
    scale = {"lora_unet_txt_in.dora_scale": torch.ones(WIDTH, 1)}
    file = write_lora(made, tmp_path / "kohya.safetensors", prefix="lora_unet_", flat=True, **scale)
    converted = FluxFillPipeline.lora_state_dict(load_file(file))
    assert "context_embedder.lora_A.weight" in converted  # load_lora_weights takes "transformer." alone
    down, up, _ = made["final_layer.linear"]
    product = converted["proj_out.lora_B.weight"] @ converted["proj_out.lora_A.weight"]
    torch.testing.assert_close(product, up @ down)  # without alpha / rank = 0.25
    assert len(converted) == 4


def test_separate_factors_side_by_side_come_apart_at_their_own_rank(tiny_model, tmp_path, rows):
    """sd-scripts writes so what it trained with split_qkv, or converted from ai-toolkit."""
    down, up = torch.randn(12, WIDTH) / 4, torch.zeros(3 * WIDTH, 12)
    for part in range(3):
        up[part * WIDTH : (part + 1) * WIDTH, 4 * part : 4 * (part + 1)] = torch.randn(WIDTH, 4) / 4
    made = {"double_blocks.0.img_attn.qkv": (down, up, 6.0)}
    file = write_lora(made, tmp_path / "lora.safetensors", prefix="lora_unet_", flat=True)
    expected = velocity_of(merged(tiny_model, changes_of(made)), rows)
    assert_same_output(velocity_from(tiny_model, lora(rank=4), file, rows), expected)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("start", ["", "^"])
def test_a_folder_of_peft(tiny_model, tmp_path, rows, use_dora, start):
    """Its alpha, by layer and with rsLoRA, stands in the JSON beside; "^", as diffusers has it: the name is whole."""
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k"],
        alpha_pattern={f"{start}transformer_blocks.1.attn.to_k": 2},
        rank_pattern={f"{start}transformer_blocks.0.attn.to_q": 3},
        use_rslora=True,
        use_dora=use_dora,
    )
    theirs = get_peft_model(load_transformer(tiny_model, dtype=torch.float32), settings)
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path)
    expected = velocity_of(theirs, rows)
    method = (DoraConfig if use_dora else type(lora())).model_validate(
        {"type": "dora" if use_dora else "lora", "rank": 4, "alpha": 4, "targets": ["to_q", "to_k"]}
    )
    assert_same_output(velocity_from(tiny_model, method, tmp_path, rows), expected)
    with pytest.raises(KeyError):
        FluxFillPipeline.lora_state_dict(load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("form", ["diffusers", "adapter's name", "OneTrainer", "alpha tensors"])
def test_names_of_diffusers_with_an_alpha(tiny_model, tmp_path, rows, form):
    live = adapted(tiny_model, lora(alpha=12))
    train_a_little(live)
    expected = velocity_of(live, rows)
    state = {
        name.replace(".default", "" if form != "adapter's name" else ".default"): parameter.detach().clone()
        for name, parameter in live.named_parameters()
        if parameter.requires_grad
    }
    file = tmp_path / "lora.safetensors"
    metadata = {"transformer.r": 4, "transformer.lora_alpha": 12}
    layers = {name.partition(".lora_")[0] for name in state}
    if form == "alpha tensors":
        metadata = {"transformer.r": 4, "transformer.lora_alpha": 4}  # the tensors are the nearer ones
        state |= {f"{layer}.alpha": torch.tensor(12.0) for layer in layers}
    if form == "OneTrainer":
        tensors = {f"lora_transformer_{layer.replace('.', '_')}.alpha": torch.tensor(12.0) for layer in layers}
        for name, tensor in state.items():
            layer, _, part = name.partition(".lora_")
            part = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
            tensors[f"lora_transformer_{layer.replace('.', '_')}.{part}"] = tensor
        save_file(tensors, file)
    else:
        tensors = {f"transformer.{name}": tensor for name, tensor in state.items()}
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(metadata)})
    assert_same_output(velocity_from(tiny_model, lora(alpha=4), file, rows), expected)


def test_the_dora_of_lycoris(tiny_model, tmp_path, rows):
    """dora_scale: a length for every row of the weight, whatever the base's row and the factors add up to."""
    made = random_lora({"single_blocks.1.linear1": (7 * WIDTH, WIDTH), "final_layer.adaLN_modulation.1": (384, WIDTH)})
    base = load_transformer(tiny_model, dtype=torch.float32)
    changes, scales = {}, {}
    for number, (layer, change) in enumerate(changes_of(made).items()):
        weight = torch.cat([base.get_submodule(row).weight for row in rows_of(layer)]).detach()
        if number == 1:
            weight = weight.roll(WIDTH, 0)  # as BFL has it
        scale = torch.rand(len(weight), 1, generator=torch.Generator().manual_seed(5)) + 0.5
        changes[layer] = scale * (weight + change) / (weight + change).norm(dim=1, keepdim=True) - weight
        scales[f"lora_unet_{layer.replace('.', '_')}.dora_scale"] = scale
    file = write_lora(made, tmp_path / "dora.safetensors", prefix="lora_unet_", flat=True, **scales)
    method = DoraConfig(type="dora", rank=4, alpha=8, targets=["to_q", "to_k", "to_v", "proj_mlp", "norm_out.linear"])
    expected = velocity_of(merged(tiny_model, changes), rows)
    assert_same_output(velocity_from(tiny_model, method, file, rows), expected)


@pytest.mark.parametrize("prefix", ["lycoris_", "transformer.", "diffusion_model.double_blocks"])
@pytest.mark.parametrize("whole", [False, True])
def test_the_lokr_of_lycoris_and_ai_toolkit(tiny_model, tmp_path, rows, prefix, whole):
    """alpha / rank where the larger matrix has factors; an alpha beside two whole ones does not count."""
    generator = torch.Generator().manual_seed(9)
    small = torch.randn(4, 4, generator=generator)
    a, b = torch.randn(48, 2, generator=generator) / 4, torch.randn(2, 48, generator=generator)
    change = torch.kron(small, a @ b) * (1 if whole else 5 / 2)
    name, flat = "transformer_blocks.1.attn.to_out.0", "_" if prefix == "lycoris_" else "."
    if "double" in prefix:
        name, prefix = "double_blocks.1.img_attn.proj", "diffusion_model."
    name = prefix + name.replace(".", flat)
    larger = {"lokr_w2": a @ b} if whole else {"lokr_w2_a": a, "lokr_w2_b": b}
    if whole:
        larger |= {"lokr_w1": small}
    else:
        larger |= {"lokr_w1_a": small, "lokr_w1_b": torch.eye(4)}
    tensors = {f"{name}.{part}": tensor for part, tensor in larger.items()} | {f"{name}.alpha": torch.tensor(5.0)}
    save_file(tensors, tmp_path / "lokr.safetensors")
    method = LokrConfig(type="lokr", rank=24 if whole else 2, alpha=4, factor=4, targets=["to_out.0"])
    expected = velocity_of(merged(tiny_model, {"double_blocks.1.img_attn.proj": change}), rows)
    assert_same_output(velocity_from(tiny_model, method, tmp_path, rows), expected)


@pytest.mark.parametrize("rank", [2, 64])
def test_a_lokr_folder_of_peft(tiny_model, tmp_path, rows, rank):
    """There alpha / r counts for whole matrices too."""
    settings = LoKrConfig(r=rank, alpha=3, decompose_factor=4, target_modules=["to_q"], init_weights="lycoris")
    theirs = get_peft_model(load_transformer(tiny_model, dtype=torch.float32), settings)
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path)
    method = LokrConfig(type="lokr", rank=rank, alpha=rank, factor=4, targets=["to_q"])
    assert_same_output(velocity_from(tiny_model, method, tmp_path, rows), velocity_of(theirs, rows))


def test_the_lora_of_xlabs(tiny_model, tmp_path, rows):
    names = {
        "double_blocks.1.img_attn.qkv": "double_blocks.1.processor.qkv_lora1",
        "double_blocks.1.img_attn.proj": "double_blocks.1.processor.proj_lora1",
        "double_blocks.1.txt_attn.qkv": "double_blocks.1.processor.qkv_lora2",
        "double_blocks.0.txt_attn.proj": "double_blocks.0.processor.proj_lora2",
    }
    made = random_lora({layer: BLOCKS[layer] for layer in names}, alpha=4.0)
    theirs = {names[layer]: factors for layer, factors in made.items()}
    file = write_lora(theirs, tmp_path / "xlabs.safetensors", prefix="", factors=("down", "up"), with_alpha=False)
    expected = velocity_of(merged(tiny_model, changes_of(made)), rows)
    assert_same_output(velocity_from(tiny_model, lora(rank=4, targets="attention"), file, rows), expected)


# --- what a file tells, and what cannot be used -----------------------------------------------------------------------

QKV = "double_blocks.0.img_attn.qkv"


@pytest.fixture
def read(tiny_model, tmp_path):
    """read(lora, **tensors): what is read of a ComfyUI file of these layers and further tensors."""
    transformer = load_transformer(tiny_model, dtype=torch.float32)

    def read(made, *, with_alpha=True, **others):
        file = tmp_path / "file.safetensors"
        write_lora(made, file, prefix="diffusion_model.", with_alpha=with_alpha, **others)
        return read_adapter(file, transformer)

    return read


def test_what_is_beside_the_factors(read):
    saved = read(
        random_lora({QKV: BLOCKS[QKV]}),
        **{
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 8),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(8, 4),
            "text_encoders.t5xxl.transformer.x.lora_up.weight": torch.zeros(8, 4),
            "diffusion_model.img_in.reshape_weight": torch.tensor([192, 384]),
        },
    )
    assert (saved.kind, saved.text_layers, saved.problems, saved.names_alpha) == ("lora", 2, [], True)
    assert {tuple(alpha) for alpha in saved.alphas.values()} == {(2.0, 4)}
    assert len(saved.layers) == 3


def test_without_an_alpha_the_scale_is_one(read):
    saved = read(random_lora({QKV: BLOCKS[QKV]}), with_alpha=False)
    assert not saved.names_alpha
    assert {alpha.scale for alpha in saved.alphas.values()} == {1.0}


@pytest.mark.parametrize(
    "others, words",
    [
        ({f"diffusion_model.{QKV}.diff": torch.zeros(576, 192)}, "img_attn.qkv.diff, which no LoRA"),
        ({"diffusion_model.img_in.diff_b": torch.zeros(192)}, "diff_b"),
        ({"diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale": torch.zeros(32)}, "query_norm.scale"),
        ({"lora_unet_double_blocks_0_img_mlp_0.hada_w1_a": torch.zeros(4, 4)}, "hada_w1_a"),
        ({"diffusion_model.double_blocks.7.img_mlp.0.alpha": torch.tensor(1.0)}, "double_blocks.7.*this model has not"),
        ({"lora_unet_down_blocks_0_attn.lora_up.weight": torch.zeros(4, 4)}, "down_blocks.*this model has not"),
        ({"diffusion_model.img_in.lora_up.weight": torch.zeros(192, 4)}, "img_in holds lora_B, but a LoRA two"),
        ({"diffusion_model.img_in.lokr_w1": torch.zeros(4, 4)}, "img_in holds lokr_w1, which is no whole LoKr"),
        ({"diffusion_model.txt_in.lokr_w1_a": torch.zeros(4, 4)}, "txt_in lacks one of lokr_w1_a and lokr_w1_b"),
        (
            {f"diffusion_model.double_blocks.1.img_attn.qkv.lokr_w{i}": torch.zeros(4, 4) for i in (1, 2)},
            "a LoKr of 3 layers in one",
        ),
        (
            {f"diffusion_model.img_in.lokr_w{i}": torch.zeros(4, 4) for i in (1, 2)},
            "a LoKr on some layers and a LoRA on others",
        ),
        ({f"diffusion_model.{QKV}.dora_scale": torch.ones(1, 192)}, r"magnitudes of \(1, 192\), not one for each"),
        (
            {f"transformer.transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.zeros(4, 4) for part in "A"}
            | {"transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(192, 4)},
            "adapts transformer_blocks.0.attn.to_q twice",
        ),
        (
            {f"diffusion_model.img_in.lora_{part}.weight": torch.zeros(8, 8) for part in ("up", "down")},
            r"factors of \(8, 8\) and \(8, 8\), made for another model",
        ),
    ],
)
def test_what_cannot_go_on_as_it_was_is_a_problem(read, others, words):
    problems = read(random_lora({QKV: BLOCKS[QKV]}), **others).problems
    assert [problem for problem in problems if re.search(words, problem)], problems


def test_settings_that_are_no_json_are_refused(tiny_model, tmp_path):
    save_adapter(adapted(tiny_model, lora()), tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(InputError, match="no JSON"):
        read_adapter(find_adapter_file(tmp_path), load_transformer(tiny_model, dtype=torch.float32))


@pytest.mark.fault(27, "a pickle in the place of an adapter, under any name")
@pytest.mark.parametrize(
    "name", ["a.bin", "a.pt", "a.ckpt", "a.safetensors", "folder/adapter_model.bin", "folder/adapter_model.safetensors"]
)
def test_a_pickle_is_no_adapter(tiny_model, tmp_path, name):
    canary = tmp_path / "canary"
    (tmp_path / "folder").mkdir()
    torch.save({"transformer.x.lora_A.weight": canary_object(canary)}, tmp_path / name)
    source = tmp_path / (name if "/" not in name else "folder")
    with pytest.raises(InputError, match=r"no \.safetensors file|cannot be read as an adapter|holds 0 \.safetensors"):
        adapted(tiny_model, lora(init_from=source))
    assert not canary.exists()


@pytest.mark.parametrize("given", ["", "checkpoints/step-00000020", "checkpoints/step-00000020/rank-00000.safetensors"])
def test_a_runs_folder_and_a_checkpoint_are_told_where_their_adapter_lies(tmp_path, given):
    steps = ("step-00000010", "step-00000020", "step-00000030.undone", "step-00000040")  # 40 is half written
    for folder in ("final", "final-ema", *(f"checkpoints/{step}/adapter" for step in steps)):
        (tmp_path / folder).mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, tmp_path / folder / "pytorch_lora_weights.safetensors")
    checkpoint = tmp_path / "checkpoints" / "step-00000020"
    (checkpoint / "state.json").write_text("{}")
    for complete in ("step-00000010", "step-00000020", "step-00000030.undone"):
        (tmp_path / "checkpoints" / complete / "COMPLETE").touch()
    save_file({"weight/x": torch.zeros(1)}, checkpoint / "rank-00000.safetensors")
    own = f"{checkpoint}/adapter. Give that"
    where = (
        f"a checkpoint; its adapter lies in {own}" if given else f"a run's folder; its adapter lies in {tmp_path}/final"
    )
    with pytest.raises(InputError, match=re.escape(f"method.init_from {tmp_path / given}: is {where}")) as refused:
        find_adapter_file(tmp_path / given)
    assert own in str(refused.value) and ("final-ema" in str(refused.value)) == (given == "")


def test_a_full_fine_tune_has_no_adapter(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"is a run's folder without an adapter, .* its export as model\.base"):
        find_adapter_file(tmp_path)


def test_a_source_that_is_no_file_of_tensors_is_refused(tiny_model, tmp_path):
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, two / name)
    (tmp_path / "pickle.bin").write_bytes(b"")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 100)
    for source, words in {
        tmp_path / "missing": "no such file or folder",
        tmp_path / "pickle.bin": "no .safetensors file",
        two: "holds 2 .safetensors files",
        tmp_path / "broken.safetensors": "cannot be read as an adapter",
        two / "a.safetensors": "holds x, which no LoRA",
    }.items():
        with pytest.raises(InputError, match=words):
            adapted(tiny_model, lora(init_from=source))
