"""An adapter is right if a stranger's FluxFillPipeline, given the folder, paints what the trainer's model painted."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs.errors import InputError
from configs.schema import FlowConfig, LoraConfig
from trainer.adapters.adapter import ADAPTER, WEIGHTS_NAME, adapter_targets, add_adapter, save_adapter
from trainer.model.flux import load_transformer, predict_velocity

RANK = 4
NO_TEXT = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


def lora(**settings) -> LoraConfig:
    return LoraConfig(**({"type": "lora", "rank": RANK, "alpha": 2 * RANK, "targets": "attention+mlp"} | settings))


def with_lora(model: Path, method: LoraConfig, *, expanded: bool = False, seed: int = 0) -> FluxTransformer2DModel:
    transformer = load_transformer(model, dtype=torch.float32)
    add_adapter(transformer, method, expanded=expanded, seed=seed)
    return transformer


def adapter_of(transformer: FluxTransformer2DModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in get_peft_model_state_dict(transformer, adapter_name=ADAPTER).items()}


def train_a_little(transformer: FluxTransformer2DModel) -> None:
    """Give every tensor of the adapter a value of its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


@pytest.fixture
def rows(load_triple):
    return load_triple(64, 64, of=(64, 64)).rows


def velocity_of(transformer: FluxTransformer2DModel, rows) -> torch.Tensor:
    with torch.no_grad():
        return predict_velocity(transformer, rows.noise, rows, torch.tensor([0.7]), FlowConfig())


# --- which layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets, per_double, per_single", [("attention", 8, 3), ("attention+mlp", 12, 5)])
def test_named_targets_are_the_linear_layers_of_every_block(pipeline, targets, per_double, per_single):
    found = adapter_targets(pipeline.transformer, lora(targets=targets))
    assert len(found) == len(set(found)) == 2 * per_double + 4 * per_single
    assert all(re.match(r"(single_)?transformer_blocks\.\d+\.", name) for name in found)
    assert not [name for name in found if "norm" in name]


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", ["proj_out"], ["to_q", "proj_out", "ff.net.2"]])
def test_the_models_own_last_layers_are_never_adapted(pipeline, targets):
    found = adapter_targets(pipeline.transformer, lora(targets=targets))
    assert not {"proj_out", "norm_out.linear"} & set(found)


def test_a_list_takes_names_as_peft_does(pipeline):
    found = adapter_targets(
        pipeline.transformer, lora(targets=["to_k", "transformer_blocks.1.attn.to_q", "x_embedder"])
    )
    assert found == [
        "x_embedder",
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.1.attn.to_k",
        *(f"single_transformer_blocks.{block}.attn.to_k" for block in range(4)),
    ]


@pytest.mark.parametrize("unknown", ["to_query", "attn", "norm1", "o_q"])
def test_an_unknown_target_is_refused_with_the_names_there_are(pipeline, unknown):
    with pytest.raises(InputError, match=rf"method\.targets.*{unknown}.*attn\.to_q") as refused:
        adapter_targets(pipeline.transformer, lora(targets=["to_q", unknown]))
    assert "transformer_blocks" not in str(refused.value)


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", ["x_embedder", "to_v"]])
def test_a_new_adapter_changes_nothing(tiny_model, pipeline, rows, targets):
    transformer = with_lora(tiny_model, lora(targets=targets))
    assert torch.equal(velocity_of(transformer, rows), velocity_of(pipeline.transformer, rows))


def test_only_the_adapter_trains_in_fp32(tiny_model):
    transformer = load_transformer(tiny_model, dtype=torch.bfloat16)
    add_adapter(transformer, lora(), expanded=False, seed=0)
    for name, parameter in transformer.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name


def test_the_start_depends_on_the_seed_alone(tiny_model):
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(states))
        before = torch.get_rng_state()
        states.append(adapter_of(with_lora(tiny_model, lora(), seed=seed)))
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_adapters_input_is_not_copied_to_fp32(tiny_model, rows):
    """Under autocast to_q, to_k and to_v read one bf16 tensor; so must their adapters, in forward and backward."""
    transformer = load_transformer(tiny_model, dtype=torch.bfloat16)
    add_adapter(transformer, lora(), expanded=False, seed=0)
    inputs = []
    attention = transformer.single_transformer_blocks[0].attn
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer.lora_A[ADAPTER].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = predict_velocity(transformer, rows.noise, rows, torch.tensor([0.5]), FlowConfig())
    assert len({tensor.data_ptr() for tensor in inputs}) == 1
    velocity.float().square().mean().backward()
    gradient = attention.to_q.lora_B[ADAPTER].weight.grad
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


# --- out --------------------------------------------------------------------------------------------------------------


def reloaded_velocity(model: Path, adapter: Path, rows) -> torch.Tensor:
    """What a user's pipeline gives, fresh from the model's folder, with the adapter loaded its own way."""
    fresh = FluxFillPipeline.from_pretrained(model, **NO_TEXT)
    before = velocity_of(fresh.transformer, rows)
    fresh.load_lora_weights(adapter)
    after = velocity_of(fresh.transformer, rows)
    assert (after - before).abs().max() > 1e-2  # the adapter does something
    return after


@pytest.mark.parametrize(
    "alpha, targets", [(2.0, "attention+mlp"), (12.0, "attention"), (4.0, ["x_embedder", "to_v", "proj_out"])]
)
def test_a_fresh_pipeline_with_the_adapter_gives_the_live_models_output(tiny_model, tmp_path, rows, alpha, targets):
    live = with_lora(tiny_model, lora(alpha=alpha, targets=targets))
    train_a_little(live)
    save_adapter(live, tmp_path)
    torch.testing.assert_close(
        reloaded_velocity(tiny_model, tmp_path, rows), velocity_of(live, rows), rtol=0, atol=1e-6
    )


def test_the_file_means_the_same_to_tools_that_read_no_alpha(tiny_model, tmp_path):
    """ComfyUI looks for alpha tensors alone, diffusers for metadata; without either the scale is 1."""
    live = with_lora(tiny_model, lora(rank=4, alpha=12))
    train_a_little(live)
    save_adapter(live, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_NAME]
    with safe_open(tmp_path / WEIGHTS_NAME, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
        names = list(file.keys())
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 4)
    saved, own = load_file(tmp_path / WEIGHTS_NAME), adapter_of(live)
    for name, tensor in own.items():
        torch.testing.assert_close(saved[f"transformer.{name}"], tensor * (3 if ".lora_B." in name else 1))
    assert all(re.fullmatch(r"transformer\..+\.lora_[AB]\.weight", name) for name in names)


def test_given_tensors_are_written_in_the_place_of_the_live_ones(tiny_model, tmp_path):
    live = with_lora(tiny_model, lora())
    average = {name: torch.full_like(p, 0.25) for name, p in live.named_parameters() if p.requires_grad}
    save_adapter(live, tmp_path, tensors=average)
    saved = load_file(tmp_path / WEIGHTS_NAME)
    assert saved.keys() == {f"transformer.{name}" for name in adapter_of(live)}
    assert all((tensor == (0.5 if ".lora_B." in name else 0.25)).all() for name, tensor in saved.items())


# --- FLUX.1-dev, expanded ---------------------------------------------------------------------------------------------


def test_an_expanded_base_gets_an_adapter_for_all_its_new_inputs(tiny_dev_model, rows):
    live = with_lora(tiny_dev_model, lora(), expanded=True)
    layer = live.x_embedder
    # Rank 320 over 384 inputs of which 320 are new; the same scale as elsewhere.
    assert layer.lora_A[ADAPTER].weight.shape == (320, 384)
    assert layer.scaling[ADAPTER] == live.transformer_blocks[0].attn.to_q.scaling[ADAPTER] == 2.0
    assert live.context_embedder.__class__ is torch.nn.Linear
    assert torch.equal(
        velocity_of(live, rows), velocity_of(load_transformer(tiny_dev_model, dtype=torch.float32), rows)
    )


def test_a_pipeline_of_dev_with_the_adapter_gives_the_live_models_output(tiny_model, tiny_dev_model, tmp_path, rows):
    """diffusers expands dev's input layer itself when the adapter's is wider."""
    live = with_lora(tiny_dev_model, lora(alpha=12), expanded=True)
    train_a_little(live)
    save_adapter(live, tmp_path)
    dev = FluxTransformer2DModel.from_pretrained(tiny_dev_model, subfolder="transformer")
    assert dev.config.in_channels == 64
    fresh = FluxFillPipeline.from_pretrained(tiny_model, transformer=dev, **NO_TEXT)
    fresh.load_lora_weights(tmp_path)
    assert fresh.transformer.config.in_channels == 384
    torch.testing.assert_close(velocity_of(fresh.transformer, rows), velocity_of(live, rows), rtol=0, atol=1e-6)


# --- starting from an existing one ------------------------------------------------------------------------------------


@pytest.fixture
def existing(tiny_model, tmp_path) -> Path:
    """A trained adapter of rank 4, alpha 8, on attention and MLP."""
    live = with_lora(tiny_model, lora())
    train_a_little(live)
    save_adapter(live, tmp_path / "existing")
    return tmp_path / "existing"


@pytest.mark.parametrize("given", ["folder", "file", "renamed"])
def test_init_from_takes_an_adapter_over(tiny_model, existing, rows, given):
    if given == "renamed":
        (existing / WEIGHTS_NAME).rename(existing / "mine.safetensors")
    source = existing / WEIGHTS_NAME if given == "file" else existing
    live = with_lora(tiny_model, lora(init_from=source))
    file = next(existing.iterdir())
    saved = load_file(file)
    for name, tensor in adapter_of(live).items():
        assert torch.equal(tensor * (2 if ".lora_B." in name else 1), saved[f"transformer.{name}"])
    assert [p.dtype for p in live.parameters() if p.requires_grad] == [torch.float32] * len(saved)
    torch.testing.assert_close(reloaded_velocity(tiny_model, file, rows), velocity_of(live, rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rank": 8, "alpha": 16}, "its rank is 4: set method.rank"),
        ({"targets": "attention"}, "adapts .*, which this run does not: see method.targets"),
        ({"targets": ["to_q", "to_k", "norm1.linear"]}, "lacks transformer_blocks.0.norm1.linear"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_what_to_set(tiny_model, existing, settings, words):
    with pytest.raises(InputError, match=words) as refused:
        with_lora(tiny_model, lora(init_from=existing, **settings))
    assert str(existing) in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 4


def test_every_misfit_is_told_at_once(tiny_model, existing):
    with pytest.raises(InputError) as refused:
        with_lora(tiny_model, lora(init_from=existing, rank=2, alpha=3, targets=["to_q", "norm.linear"]))
    message = str(refused.value)
    assert all(words in message for words in ("lacks", "adapts", "its rank is 4"))


def test_an_adapter_on_fill_does_not_fit_an_expanded_dev(tiny_dev_model, existing):
    with pytest.raises(InputError, match="lacks x_embedder, which this run adapts"):
        with_lora(tiny_dev_model, lora(init_from=existing), expanded=True)


def changed(source: Path, target: Path, change) -> Path:
    """A copy of an adapter file without metadata, its tensors changed."""
    tensors = load_file(source / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, target)
    return target


def test_without_metadata_alpha_is_the_rank_as_diffusers_reads_it(tiny_model, existing, tmp_path, rows):
    plain = changed(existing, tmp_path / "plain.safetensors", lambda tensors: None)
    for alpha in (RANK, 3 * RANK):  # the config's own alpha changes how it goes on, not where
        live = with_lora(tiny_model, lora(init_from=plain, alpha=alpha))
        expected = reloaded_velocity(tiny_model, plain, rows)
        torch.testing.assert_close(velocity_of(live, rows), expected, rtol=0, atol=1e-6)


def test_alpha_tensors_are_heeded(tiny_model, existing, tmp_path, rows):
    def add_alphas(tensors):
        layers = {name.partition(".lora_")[0] for name in tensors}
        tensors.update({f"{layer}.alpha": torch.tensor(12.0) for layer in layers})

    file = changed(existing, tmp_path / "alphas.safetensors", add_alphas)
    for alpha in (12, RANK):
        live = with_lora(tiny_model, lora(init_from=file, alpha=alpha))
        expected = reloaded_velocity(tiny_model, file, rows)
        torch.testing.assert_close(velocity_of(live, rows), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.update({"text_encoder.x.lora_A.weight": torch.zeros(4, 8)}), "text encoders"),
        (lambda t: t.update({"transformer.x_embedder.lora_A.weight": torch.zeros(4, 384)}), "adapts x_embedder"),
        (
            lambda t: t.update({"transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": torch.zeros(192)}),
            "it is a DoRA: set method.type",
        ),
        (
            lambda t: t.update({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 3072)}),
            "made for another model",
        ),
        (lambda t: t.update({"lora_unet_x.dora_scale": torch.zeros(8, 1)}), "DoRA in kohya's format"),
        (lambda t: t.clear(), "lacks"),
    ],
)
def test_a_file_with_other_tensors_is_refused(tiny_model, existing, tmp_path, change, words):
    file = changed(existing, tmp_path / "other.safetensors", change)
    with pytest.raises(InputError, match=words):
        with_lora(tiny_model, lora(init_from=file, alpha=RANK))


def test_a_source_that_is_no_adapter_is_refused(tiny_model, tmp_path):
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
        tmp_path / "broken.safetensors": "not a FLUX.1 LoRA that diffusers reads",
    }.items():
        with pytest.raises(InputError, match=words):
            with_lora(tiny_model, lora(init_from=source))


def test_a_kohya_file_can_be_gone_on_from(tiny_model, tmp_path, rows):
    """sd-scripts' names and layout: q, k and v share one pair of factors; alpha is a tensor, folded in on reading."""
    generator, width = torch.Generator().manual_seed(2), 192
    shapes = {"attn_qkv": (3 * width, width), "attn_proj": (width, width), "mlp_0": (4 * width, width)}
    tensors = {}
    # Of the double blocks alone: diffusers' converter knows the single blocks' fused layers in FLUX.1's own width only.
    for block in range(2):
        for stream in ("img", "txt"):
            for part, (to, of) in shapes.items():
                name = f"lora_unet_double_blocks_{block}_{stream}_{part}"
                tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, of, generator=generator)
                tensors[f"{name}.lora_up.weight"] = torch.randn(to, RANK, generator=generator)
                tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "kohya.safetensors")

    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    names = [*(f"attn.{name}" for name in attention), "ff.net.0.proj", "ff_context.net.0.proj"]
    targets = [f"transformer_blocks.{block}.{name}" for block in range(2) for name in names]
    live = with_lora(tiny_model, lora(alpha=RANK, targets=targets, init_from=tmp_path / "kohya.safetensors"))
    expected = reloaded_velocity(tiny_model, tmp_path / "kohya.safetensors", rows)
    torch.testing.assert_close(velocity_of(live, rows), expected, rtol=0, atol=1e-6)
