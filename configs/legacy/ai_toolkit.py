"""An ai-toolkit job of type sd_trainer, and the `migrated` inpainting config that is one, in our words."""

from typing import Any

from configs.legacy import ai_toolkit_data, ai_toolkit_train
from configs.legacy.ai_toolkit_data import DataFacts
from configs.legacy.draft import Draft, Imported, known_keys
from configs.legacy.words import CountPictures, begin_job, end_job, precision_of, put_base

PROCESSES = ("sd_trainer", "diffusion_trainer", "ui_trainer")

_OTHER_LORA = "give the adapter to start from: method.init_from"
_PROMPTS = "held-out pictures are filled, with their own captions and masks: data.holdout, validation.images"
_PARTS = "text encoders and VAE come with model.base"
_HUB = "copy runs/<name>/final to the hub yourself"

_NETWORK = {
    "conv": "FLUX.1 has no convolutions",
    "conv_alpha": "FLUX.1 has no convolutions",
    "dropout": "adapters are trained without dropout; fewer steps or a lower rank overfit less",
    "transformer_only": "text encoders are never trained",
    "network_kwargs.*": "name the layers in method.targets",
    "old_lokr_format": "LoKr is written as LyCORIS names it",
    "lokr_full_rank": "a rank of at least half a layer's side makes it whole: method.rank",
    "lokr_factor": "only LoKr has a factor",
    "lorm_config*": "there is no LoRM",
    "layer_offloading*": "give model.precision nf4 or int8, if memory is short",
    "all_layers": "which layers are adapted: method.targets",
    "split_multistage_loras": "FLUX.1 is one model",
}
_MODEL = {
    "quantize_te": "T5 runs before training and is gone then; to run it in 8 bits: data.encoders.t5_precision=int8",
    "qtype_te": "T5 runs before training and is gone then; to run it in 8 bits: data.encoders.t5_precision=int8",
    "low_vram": "encoders are not loaded while training; if memory is short, model.precision nf4 or int8",
    "dtype": "bf16 on a GPU: model.precision",
    "vae_path": _PARTS,
    "te_name_or_path": _PARTS,
    "extras_name_or_path": _PARTS,
    "text_encoder_bits": _PARTS,
    "lora_path": _OTHER_LORA,
    "assistant_lora_path": "it makes FLUX.1-schnell trainable, which is no model that fills holes",
    "inference_lora_path": "validation uses what is trained alone",
    "latent_space_version": _PARTS,
    "only_if_contains*": "name the layers in method.targets",
    "ignore_if_contains*": "name the layers in method.targets",
    "attn_masking": "FLUX.1 attends to all tokens of its text, as it was trained to",
    "split_model_over_gpus": "to share a model among GPUs: parallel.engine=fsdp2",
    "layer_offloading*": "give model.precision nf4 or int8, if memory is short",
    "model_kwargs.*": "settings of another architecture",
    "accuracy_recovery_adapter": "a quantized base is used as it is",
    "is_*": "only FLUX.1-dev and FLUX.1-Fill-dev are trained",
    "arch": "only FLUX.1-dev and FLUX.1-Fill-dev are trained",
    "*": "not used",
}
_SAVE = {
    "dtype": "adapters are written in fp32, models in bf16: `fluxfill export --dtype`",
    "save_format": "adapters are written as safetensors, models in diffusers' layout",
    "push_to_hub": _HUB,
    "hf_repo_id": _HUB,
    "hf_private": _HUB,
}
_SAMPLE = {
    "sampler": "pictures are sampled by FluxFillPipeline",
    "sample_start_step": "pictures are sampled from validation.every_steps on",
    "guidance_scale": "pictures are sampled with flow.guidance, which is also trained with",
    "*": _PROMPTS,
}
_LOGGING = {
    "log_every": "metrics.jsonl has every step",
    "use_wandb": "logging.trackers: tensorboard, and metrics.jsonl, which any tool reads",
    "*": "logging.trackers: tensorboard, and metrics.jsonl",
}
_ADAPTER = "a control adapter: FLUX.1-Fill has inputs for holed picture and mask of its own, and needs none"
_PROCESS = {
    "device": "`fluxfill train` uses every GPU; choose some by CUDA_VISIBLE_DEVICES",
    "performance_log_every": "metrics.jsonl has the seconds of every step",
    "log_dir": "TensorBoard's files are in the run's folder",
    "torch_profiler": "not used",
    "sqlite_db_path": "there is no job list: a run's folder holds all of it",
    "first_sample.*": _PROMPTS,
    "embedding.*": "no embeddings are trained",
    "decorator.*": "no decorator is trained",
    "adapter.*": _ADAPTER,
    "adapter": _ADAPTER,
    "slider.*": "no sliders are trained",
    "guidance.*": "not used",
    "do_lorm*": "there is no LoRM",
    "lorm_*": "there is no LoRM",
    **{f"network.{name}": why for name, why in _NETWORK.items()},
    **{f"save.{name}": why for name, why in _SAVE.items()},
    **{f"logging.{name}": why for name, why in _LOGGING.items()},
}
# Keys that are translated, beside those that have no equivalent: an unknown key may be one of them, misspelt.
_NAMES = {
    **known_keys(
        {
            "network": "linear linear_alpha rank alpha pretrained_lora_path",
            "train": "steps lr batch_size gradient_accumulation gradient_accumulation_steps optimizer lr_scheduler",
            "model": "name_or_path quantize qtype",
            "save and sample": "save_every max_step_saves_to_keep sample_every sample_steps",
            "datasets": "folder_path mask_path resolution num_repeats caption_ext caption_dropout_rate",
        }
    ),
    **_PROCESS,
    **_MODEL,
    **_SAMPLE,
    **ai_toolkit_train.KNOWN,
    **ai_toolkit_data.KNOWN,
}


def import_sd_trainer(tree: dict[str, Any], count_pictures: CountPictures) -> Imported:
    """Translate a job whose first trainable process is one of PROCESSES. tree: with its variables filled in."""
    tree = _fill_name(tree)
    draft, at = begin_job(tree, "ai-toolkit", PROCESSES)
    draft.put(f"{at}.training_seed", "run.seed", abs(draft.integer(f"{at}.training_seed", 42)) % 2**63)
    trains = put_base(draft, f"{at}.model.name_or_path", str(draft.get(f"{at}.model.name_or_path", "")))
    method = _put_network(draft, at)
    _put_model(draft, at, method)
    facts = ai_toolkit_data.put_datasets(draft, at, count_pictures)
    steps_per_update = ai_toolkit_train.put_train(draft, f"{at}.train", facts.samples)
    _put_saves_and_samples(draft, at, steps_per_update)
    draft.drop_known(_PROCESS, f"{at}.")
    end_job(draft, tree, at)
    _say_what_it_did(draft, at, facts, method, trains)
    return draft.finish(_NAMES)


def _fill_name(tree: dict[str, Any]) -> dict[str, Any]:
    """[name] stands for the job's name everywhere."""
    name = str(tree["config"].get("name", ""))

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [fill(inner) for inner in value]
        return value.replace("[name]", name) if isinstance(value, str) else value

    return {key: fill(value) for key, value in tree.items()}


def _put_network(draft: Draft, at: str) -> str:
    """Set the method; returns its type."""
    network = f"{at}.network"
    if not draft.has(network) or (network in draft.leaves and not draft.leaves[network]):
        draft.set("method.type", "full", "the old config has no network, so every weight was trained")
        draft.answer(network, "taken", "method.type: full")
        return "full"
    old = str(draft.get(f"{network}.type", "lora")).lower()
    method = "lokr" if old == "lokr" else "lora"
    why = "" if old == method else f"there is no {old}: on FLUX.1, which has no convolutions, locon is lora"
    draft.put(f"{network}.type", "method.type", method, why)
    rank_key = f"{network}.linear" if draft.get(f"{network}.linear") is not None else f"{network}.rank"
    rank = draft.integer(rank_key, 4)
    if rank_key.endswith("linear"):
        draft.answer(f"{network}.rank", "ignored by the old trainer too", "", "linear counts before rank")
    if method == "lokr" and draft.flag(f"{network}.lokr_full_rank", True):
        why = "lokr_full_rank kept the larger matrix whole, which a rank above half of any layer's side does"
        draft.put(rank_key, "method.rank", 10_000, why)
        draft.answer(f"{network}.lokr_full_rank", "converted", "method.rank: 10000", why)
        rank = 10_000
    else:
        draft.put(rank_key, "method.rank", rank)
        if method == "lokr":
            draft.answer(f"{network}.lokr_full_rank", "taken", f"method.rank: {rank}")
    if method == "lokr":
        factor = draft.integer(f"{network}.lokr_factor", -1)
        why = "about the square root of a layer's sides" if factor < 2 else ""
        draft.put(f"{network}.lokr_factor", "method.factor", factor if factor >= 2 else "auto", why)
    draft.set(
        "method.alpha", float(rank), "as the rank: for FLUX.1 the old trainer set it so, whatever the config said"
    )
    for key in (f"{network}.linear_alpha", f"{network}.alpha"):
        alpha = draft.get(key)
        why = "for FLUX.1 alpha was always set to the rank"
        draft.answer(key, "taken" if alpha == rank else "ignored by the old trainer too", f"method.alpha: {rank}", why)
        if alpha is not None and alpha != rank:
            text = f"{alpha} of {key.rpartition('.')[2]} counted for nothing: the adapter was trained at full strength"
            draft.really_did.append(
                f"It set alpha to the rank, {rank}, as it does for every FLUX.1 network: the {text}."
            )
    draft.set(
        "method.targets", "attention+mlp", "the old trainer also adapted the modulations, which are not adapted here"
    )
    start = draft.get(f"{network}.pretrained_lora_path")
    if isinstance(start, str):
        draft.put(f"{network}.pretrained_lora_path", "method.init_from", start)
    draft.drop_always(f"{network}.transformer_only", "text encoders are never trained")
    return method


def _put_model(draft: Draft, at: str, method: str) -> None:
    model = f"{at}.model"
    kind = str(draft.get(f"{model}.qtype", "qfloat8"))
    quantized = draft.flag(f"{model}.quantize")
    precision, why = precision_of(method, quantized, kind)
    draft.put(f"{model}.quantize", "model.precision", precision, why)
    if quantized:
        draft.answer(f"{model}.qtype", "converted", f"model.precision: {precision}", why)
        if draft.config["model"].get("precision") != "auto":
            draft.notes["model.precision"] = f"model.quantize, of {kind}: {why}"
    else:
        draft.answer(
            f"{model}.qtype", "ignored by the old trainer too", "", "without quantize: true nothing is quantized"
        )
    if draft.flag(f"{model}.is_flux") or str(draft.get(f"{model}.arch", "")).split(":")[0] == "flux":
        draft.answer(f"{model}.is_flux", "taken", "always")
        draft.answer(f"{model}.arch", "taken", "always")
    compiled = [key for key in (f"{model}.compile", f"{model}.block_compile") if draft.flag(key)]
    if compiled:
        draft.put(compiled[0], "train.compile", "regional", "the blocks are compiled")
    draft.drop_known(_MODEL, f"{model}.")


def _put_saves_and_samples(draft: Draft, at: str, steps_per_update: int) -> None:
    saves, why = ai_toolkit_train.interval(draft, f"{at}.save.save_every", 1000, steps_per_update)
    draft.put(f"{at}.save.save_every", "checkpoint.every_steps", saves, why)
    keep = draft.integer(f"{at}.save.max_step_saves_to_keep", 5)
    draft.put(f"{at}.save.max_step_saves_to_keep", "checkpoint.keep_last", keep if keep > 0 else None)
    key = f"{at}.sample.sample_every"
    if draft.flag(f"{at}.train.disable_sampling"):
        draft.put(
            f"{at}.train.disable_sampling", "validation.every_steps", None, "without sampling, nothing is validated"
        )
        draft.answer(key, "ignored by the old trainer too", "", "disable_sampling is set")
    else:
        draft.answer(f"{at}.train.disable_sampling", "taken", "validation.every_steps")
        samples, why = ai_toolkit_train.interval(draft, key, 100, steps_per_update)
        draft.put(key, "validation.every_steps", samples, why)
    sampler_steps = max(1, draft.integer(f"{at}.sample.sample_steps", 20))
    draft.put(f"{at}.sample.sample_steps", "validation.sampler_steps", sampler_steps)
    draft.answer(f"{at}.sample.enabled", "ignored by the old trainer too", "", "no key of its: disable_sampling is")
    draft.drop_known(_SAMPLE, f"{at}.sample.")


def _say_what_it_did(draft: Draft, at: str, facts: DataFacts, method: str, trains: str) -> None:
    """In front: what kind of model came of it."""
    said = []
    if "fill" in str(draft.get(f"{at}.model.name_or_path", "")).lower():
        said.append(
            "FLUX.1-Fill has 384 inputs, and the old trainer's FLUX.1 feeds 64: training on these weights ended in an "
            "error of shapes before its first step. Here all 384 are fed."
        )
    else:
        what = "every weight" if method == "full" else "an adapter"
        said.append(
            f"It trained {what} of a text-to-image model: neither the holed picture nor the mask was an input, so what "
            f"came of it does not fill holes. {trains}"
        )
    if facts.has_masks:
        said.append(
            "mask_path weighed the loss, and nothing else: white was trained, black by mask_min_value (0 unless set), "
            "with an edge that was blurred by up to 0.5 % of the picture each time. Here the mask is the hole, and "
            "sharp; how much the rest of the picture counts is flow.keep_weight: 1 as FLUX.1-Fill, 0 as it was."
        )
    if facts.has_inpaint:
        said.append(
            "inpaint_path was never used: FLUX.1 is trained without it, and files that are not .png or .webp with "
            "transparency were passed over without a word. The holed pictures of the old set-up trained nothing."
        )
    draft.really_did[:0] = said
