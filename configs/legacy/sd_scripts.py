"""FLUX.1 training by sd-scripts (flux_train_network.py, flux_train.py) in our words: arguments and datasets in TOML."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from configs.errors import InputError
from configs.legacy.amount import accumulated, of_epochs
from configs.legacy.draft import Draft, Imported, known_keys
from configs.legacy.sd_scripts_data import put_datasets
from configs.legacy.words import (
    CountPictures,
    precision_of,
    put_base,
    put_guidance,
    put_interval,
    put_optimizer,
    run_name,
    set_defaults,
)

_PARTS = "text encoders and VAE come with model.base"
_CAPTIONS = "captions are encoded once, as they are written"
_BUCKETS = "pictures always go to buckets of equal area, in steps of 16 pixels"
_ONCE = "pictures are encoded once: write changed copies of the files, if they are to be changed"
_MEMORY = "if memory is short: model.precision nf4 or int8"
_PROMPTS = "held-out pictures are filled, with their own captions and masks: data.holdout, validation.images"
_LABEL = "it labelled the old weights"
_HUB = "copy runs/<name>/final to the hub yourself"
_READER = "data.reader_threads is right as it is: nothing is decoded while training"
_LOSS = "the loss is flow matching's squared error, weighed by flow.hole_weight and flow.keep_weight"

KNOWN = known_keys(
    {
        _PARTS: "clip_l t5xxl ae vae tokenizer_cache_dir",
        "not FLUX.1-Fill's": (
            "v2 v_parameterization clip_skip model_type apply_t5_attn_mask no_half_vae controlnet_model_name_or_path "
            "stop_text_encoder_training"
        ),
        _CAPTIONS: (
            "shuffle_caption keep_tokens* caption_prefix caption_suffix *separator enable_wildcard "
            "caption_tag_dropout_rate caption_dropout_every_n_epochs caption_extention weighted_captions "
            "max_token_length secondary_separator"
        ),
        _BUCKETS: "enable_bucket bucket_* min_bucket_reso max_bucket_reso",
        "data.min_side and data.max_enlarge leave pictures out": "skip_image_resolution",
        "pictures are scaled down by area, and up by Lanczos": "resize_interpolation",
        _ONCE: "color_aug random_crop face_crop_aug_range token_warmup*",
        _MEMORY: (
            "blocks_to_swap lowram highvram cpu_offload_checkpointing split_mode full_bf16 full_fp16 "
            "fp8_base_unet single_blocks_to_swap double_blocks_to_swap lowvram mem_eff_save "
            "blockwise_fused_optimizers fused_backward_pass fused_optimizer_groups disable_mmap_load_safetensors"
        ),
        _PROMPTS: (
            "sample_prompts sample_at_first sample_sampler sample_every_n_epochs sample_every_n_steps validation_* "
            "validate_every_n_* max_validation_steps"
        ),
        _LABEL: "metadata_* training_comment no_metadata training_*",
        _HUB: "huggingface_* async_upload resume_from_huggingface save_state_to_huggingface",
        _READER: "max_data_loader_n_workers persistent_data_loader_workers vae_batch_size",
        _LOSS: (
            "loss_type huber_* masked_loss min_snr_gamma prior_loss_weight debiased_estimation_loss v_pred_like_loss "
            "scale_v_pred_loss_like_noise_pred zero_terminal_snr"
        ),
        "noise is drawn plainly": "noise_offset* multires_noise_* ip_noise_gamma* adaptive_noise_scale",
        "noise levels are drawn by flow.timestep_sampling and flow.shift": (
            "weighting_scheme logit_mean logit_std mode_scale sigmoid_scale"
        ),
        "all noise levels are trained": "min_timestep max_timestep",
        "FLUX.1 predicts noise - picture, as it was trained to (raw)": "model_prediction_type",
        "PyTorch's own attention is used": "sdpa xformers mem_eff_attn split_attn",
        "text encoders are never trained: their output is encoded once": (
            "network_train_unet_only cache_text_encoder_outputs* text_encoder_lr"
        ),
        "adapters of the transformer are trained, without dropout": (
            "network_train_text_encoder_only network_dropout scale_weight_norms"
        ),
        "which layers are adapted: method.targets": "network_args base_weights* dim_from_weights",
        "fixed here: AdamW's betas are 0.9 and 0.999, its eps 1e-8 (docs/methods.md)": "optimizer_args",
        "the schedule covers the whole run, once": (
            "lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_args lr_scheduler_type"
        ),
        "the schedule covers the whole run: train.lr_schedule": "lr_scheduler_timescale lr_decay_steps",
        "`fluxfill export --dtype`; adapters are safetensors in fp32": "save_model_as save_precision",
        "checkpoints always hold all that a run goes on from": (
            "save_state save_state_on_train_end save_last_n_* save_n_epoch_ratio"
        ),
        "saves are counted in steps: checkpoint.every_steps": "save_every_n_epochs save_every_n_steps",
        "of the two, one is enough: train.steps": "max_train_epochs max_train_steps",
        "give the adapter to start from: method.init_from": "network_weights",
        "the same command goes on with a run, from its newest checkpoint": (
            "resume skip_until_initial_step initial_step initial_epoch"
        ),
        "logging.trackers: tensorboard": "logging_dir log_* wandb_* console_log_*",
        "`fluxfill train` starts a process per GPU; how they share the model: parallel.engine": (
            "num_cpu_threads_per_process ddp_* deepspeed zero_* offload_*"
        ),
        "set train.compile: regional": "torch_compile dynamo_backend",
        "give the folder as a dataset's target": "train_data_dir reg_data_dir in_json dataset_class",
        "give each dataset its folder of masks": "conditioning_data_dir",
        "give the dataset another data.datasets.0.weight": "dataset_repeats",
        "only the command line reads it": "config_file debug_dataset",
        "`fluxfill migrate` reads lists and transparency": "cache_info metadata_file alpha_mask",
        "trained here like any other dataset: remove it, if it shows what is not to be painted": "is_reg",
        "bf16 on a GPU: model.precision": "mixed_precision",
        "the cache is checked by itself": "skip_cache_check skip_latents_validity_check",
        "train.optimizer names it": "use_8bit_adam use_lion_optimizer",
        "the config of a run is in its folder": "output_config",
    }
)
_OTHER_ADAPTERS = ("loha", "diag-oft", "boft", "oft", "ia3", "glora", "dylora", "lora_fa", "lora-fa")
# What is always done here; and amounts, of which 0 is another one, not none.
ALWAYS = (
    *("enable_bucket", "network_train_unet_only", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
    *("sdpa", "save_state", "save_state_on_train_end", "prior_loss_weight", "max_data_loader_n_workers"),
    *("persistent_data_loader_workers", "lr_scheduler_num_cycles", "lr_scheduler_power"),
    *("flux1_checkbox", "flux1_cache_text_encoder_outputs", "flux1_cache_text_encoder_outputs_to_disk"),  # the GUI's
)
_TIMESTEPS = {
    "uniform": ("uniform", "none", ""),
    "sigmoid": ("logit_normal", "none", ""),
    "shift": ("logit_normal", None, ""),
    "flux_shift": ("logit_normal", "dynamic", ""),
    "sigma": ("uniform", None, "uniform, moved towards noise by discrete_flow_shift"),
}


@dataclass(frozen=True)
class Dialect:
    """How a program that starts sd-scripts writes its arguments down.

    spelled: argument -> its word for it.  known: beside KNOWN, pattern of a key -> why it has no equivalent.  epochs:
    the key that counts a run in epochs.
    """

    program: str = "sd-scripts"
    spelled: Mapping[str, str] = field(default_factory=dict)
    known: Mapping[str, str] = field(default_factory=dict)
    epochs: str = "max_train_epochs"


def import_sd_scripts(
    arguments: dict[str, Any],
    datasets: dict[str, Any] | None,
    count_pictures: CountPictures,
    dialect: Dialect | None = None,
) -> Imported:
    """Translate the arguments of a run, whose sections are only for the eye, and its datasets, from the same or another
    file."""
    dialect = dialect or Dialect()
    flat = dict(
        _without_sections({key: value for key, value in arguments.items() if key not in ("general", "datasets")})
    )
    given = datasets if datasets is not None else {k: arguments[k] for k in ("general", "datasets") if k in arguments}
    draft = Draft({**flat, **given}, dialect.program, spelled=dialect.spelled)
    name = run_name(str(draft.get("output_name", "imported")))
    set_defaults(draft, name)
    draft.put(
        "output_name", "run.name", name, "" if name == draft.get("output_name", name) else "letters, digits, . _ -"
    )
    draft.put("output_dir", "run.dir", str(draft.get("output_dir") or "runs"))
    draft.put("seed", "run.seed", abs(draft.integer("seed", 42)) % 2**63)
    trains = put_base(draft, "pretrained_model_name_or_path", str(draft.get("pretrained_model_name_or_path", "")))
    samples, batch = put_datasets(draft, count_pictures)
    method = _put_network(draft)
    quantized = draft.flag("fp8_base")
    precision, why = precision_of(method, quantized, "fp8")
    draft.put("fp8_base", "model.precision", precision, why)
    _put_train(draft, samples, batch, dialect.epochs)
    if given:
        draft.answer("dataset_config", "converted", "data.datasets", "its keys are listed here too")
    else:
        draft.drop("dataset_config", "the file is not here: --data FILE names it")
    known = {**dialect.known, **KNOWN}
    for prefix in {key[: key.rfind(".") + 1] for key in draft.open_keys()}:
        draft.drop_known(known, prefix, ALWAYS)
    draft.really_did.insert(
        0,
        "It trained FLUX.1 to make pictures from text: conditioning_data_dir weighed the loss and was no input, so "
        f"what came of it does not fill holes. {trains}",
    )
    return draft.finish(known)


def _without_sections(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _without_sections(value)
        else:
            yield key, value


def _put_network(draft: Draft) -> str:
    module, options = str(draft.get("network_module", "")), _options(draft, "network_args")
    if not module and not draft.number("network_dim", 0):
        draft.set("method.type", "full", "there is no network_module, so every weight was trained")
        for key in ("network_module", "network_dim", "network_alpha"):
            draft.answer(key, "taken", "method.type: full", "no adapter")
        return "full"
    word = f"{options.get('algo', '')} {module}".lower()
    if "native fine-tuning" in word or options.get("algo") == "full":
        draft.put("network_module", "method.type", "full", "LyCORIS' full: every weight is trained")
        for key in ("network_dim", "network_alpha"):
            draft.answer(key, "ignored by the old trainer too", "", "every weight is trained")
        return "full"
    method = "lokr" if "lokr" in word else "lora"
    other = next((name for name in _OTHER_ADAPTERS if name in word), "")
    is_dora = options.get("dora_wd", "").lower() == "true" or draft.flag("dora_wd")
    if method == "lora" and not other and is_dora and "lycoris" in word:
        method = "dora"
        draft.answer("dora_wd", "converted", "method.type: dora")
    why = f"there is no {other} here: plain LoRA of the same rank" if other else "LoRA of the transformer"
    draft.put("network_module", "method.type", method, {"lokr": "LyCORIS' LoKr", "dora": "DoRA"}.get(method, why))
    if other and method == "lora":
        draft.really_did.append(f"Its adapter was a {other}, which is not trained here: this one is a plain LoRA.")
    rank = draft.integer("network_dim", 4) or 4
    draft.put("network_dim", "method.rank", rank)
    if method == "lokr":
        _put_factor(draft, options)
    alpha = draft.number("network_alpha", 1.0)
    why = "" if alpha else "0 stood for the rank"
    alpha = alpha or rank
    draft.put("network_alpha", "method.alpha", float(alpha), why)
    if 0 < alpha < rank:
        draft.really_did.append(
            f"Its adapter was scaled by alpha / rank = {alpha:g} / {rank} = {alpha / rank:.3g}, and so is this one."
        )
    if draft.get("network_weights") and isinstance(draft.get("network_weights"), str):
        draft.put("network_weights", "method.init_from", str(draft.get("network_weights")))
    return method


def _put_factor(draft: Draft, options: Mapping[str, str]) -> None:
    """Set LoKr's factor, of network_args, or a key of its own in the GUI."""
    try:
        factor = int(options["factor"]) if "factor" in options else draft.integer("factor", -1)
    except ValueError as error:
        raise InputError("network_args has a factor that must be an integer. Correct it there.") from error
    why = "about the square root of a layer's sides" if factor < 2 else ""
    draft.put("factor", "method.factor", factor if factor >= 2 else "auto", why)
    if "factor" in options:
        draft.notes["method.factor"] = f"network_args: factor {factor}" + (f": {why}" if why else "")
        what = "; ".join(f"{key} {value}" for key, value in options.items() if key not in ("factor", "algo"))
        draft.answer("network_args", "converted", f"method.factor: {factor}", what and f"not carried over: {what}")


def _options(draft: Draft, key: str) -> dict[str, str]:
    """key=value arguments: a list, or one text, as the GUI has them."""
    value = draft.get(key)
    words = value.replace('"', "").split() if isinstance(value, str) else value if isinstance(value, list) else []
    return dict(str(one).split("=", 1) for one in words if "=" in str(one))


def _put_train(draft: Draft, samples: int | None, batch: int, epochs_key: str) -> None:
    batch, accumulation = max(1, batch), max(1, draft.integer("gradient_accumulation_steps", 1))
    amount = accumulated(draft.integer("max_train_steps", 1600) or 1600, batch, accumulation)
    epochs = draft.integer(epochs_key, 0)
    size = amount.global_batch_size
    if epochs <= 0:
        draft.put("max_train_steps", "train.steps", amount.steps)
    elif samples:
        steps = of_epochs(epochs, samples, size).steps
        draft.put(epochs_key, "train.steps", steps, f"{epochs} epochs of {samples} samples, {size} an update")
    else:
        why = f"pictures x repeats x {epochs} epochs / {size}; the folders cannot be counted here, --pictures N says it"
        draft.ask("train.steps", why)
        draft.answer(epochs_key, "no equivalent", "", why)
    if epochs > 0 and draft.number("max_train_steps", 0):
        draft.answer("max_train_steps", "ignored by the old trainer too", "", f"{epochs_key} counts before it")
    if epochs_key != "epoch":
        why = "max_train_epochs and max_train_steps count before it"
        draft.answer("epoch", "ignored by the old trainer too", "", why)
    why = f"samples per update on one GPU: batch {batch} x gradient_accumulation_steps {accumulation}"
    draft.set("train.global_batch_size", size, why)
    draft.answer("train_batch_size", "converted", f"train.global_batch_size: {size}", why)
    draft.answer("gradient_accumulation_steps", "converted", f"train.global_batch_size: {size}", why)
    lr_key = "unet_lr" if draft.number("unet_lr", 0) else "learning_rate"
    if lr_key == "unet_lr":
        draft.answer("learning_rate", "converted", "", "unet_lr was the transformer's rate")
    else:
        draft.answer("unet_lr", "taken", "off", "learning_rate was the transformer's rate")
    optimizer = str(draft.get("optimizer_type") or ("AdamW8bit" if draft.flag("use_8bit_adam") else "AdamW"))
    put_optimizer(draft, "optimizer_type", optimizer, lr_key, draft.number(lr_key, 2e-6))
    given = _options(draft, "optimizer_args")
    try:
        decay = float(given.get("weight_decay", 0.01 if "adamw" in optimizer.lower() else 0.0))
    except ValueError as error:
        raise InputError("optimizer_args has a weight_decay that must be a number. Correct it there.") from error
    note = "optimizer_args" if "weight_decay" in given else "the old trainer's default"
    draft.set("train.weight_decay", decay, note)
    draft.put("max_grad_norm", "train.max_grad_norm", float(draft.number("max_grad_norm", 1.0)) or None)
    draft.put("gradient_checkpointing", "train.activation_checkpointing", draft.flag("gradient_checkpointing"))
    _put_schedule(draft)
    _put_flow(draft)
    for section, verb in (("checkpoint", "save"), ("validation", "sample")):
        in_steps, in_epochs = f"{verb}_every_n_steps", f"{verb}_every_n_epochs"
        put_interval(draft, [in_steps], in_epochs, f"{section}.every_steps", samples, size)


def _put_schedule(draft: Draft) -> None:
    old = str(draft.get("lr_scheduler", "constant"))
    schedule = "cosine" if "cosine" in old else "linear" if old in ("linear", "polynomial") else "constant"
    ratio = draft.number("lr_scheduler_min_lr_ratio", 0.0)
    has_floor = old == "cosine_with_min_lr" and ratio > 0
    end = f"to {ratio:g} of it" if has_floor else "to 0"
    why = "" if old == schedule else {"constant": "the rate does not fall"}.get(schedule, f"once over the run, {end}")
    draft.put("lr_scheduler", "train.lr_schedule", schedule, why)
    if has_floor:
        draft.put("lr_scheduler_min_lr_ratio", "train.lr_final_fraction", min(1.0, float(ratio)))
    elif schedule == "constant" and old.startswith("warmup_stable"):
        why = "there is no fall at the end of a constant rate: train.lr_schedule, train.lr_final_fraction"
        draft.answer("lr_scheduler_min_lr_ratio", "no equivalent", "", why)
    else:
        draft.answer("lr_scheduler_min_lr_ratio", "ignored by the old trainer too", "", f"not used by {old}")
    _put_warmup(draft)


def _put_warmup(draft: Draft) -> None:
    key = "lr_warmup_steps"
    warmup, percent = draft.number(key, 0), draft.number("lr_warmup", 0)  # the latter is the GUI's
    share = warmup if 0 < warmup < 1 else 0.0
    if not warmup and percent > 0:
        draft.answer(key, "taken", "off", "lr_warmup counts")
        key, share = "lr_warmup", percent / 100
    else:
        why = f"{key} counts before it" if warmup else "off here too"
        draft.answer("lr_warmup", "ignored by the old trainer too" if warmup else "taken", "off", why)
    steps = draft.config["train"].get("steps")
    why = ""
    if share and not isinstance(steps, int):
        what = f"{share:g} x train.steps"
        draft.ask("train.warmup_steps", what)
        draft.answer(key, "no equivalent", "", f"a share of the steps, which are not known: {what}")
        return
    if share:
        warmup, why = round(percent * steps / 100) if key == "lr_warmup" else int(share * steps), "a share of the steps"
    if isinstance(steps, int) and warmup >= steps:
        warmup, why = max(0, steps - 1), "fewer than there are steps"
    draft.put(key, "train.warmup_steps", int(warmup), why)


def _put_flow(draft: Draft) -> None:
    old = str(draft.get("timestep_sampling", "sigma"))
    sampling, shift, why = _TIMESTEPS.get(old, _TIMESTEPS["flux_shift"])
    draft.put("timestep_sampling", "flow.timestep_sampling", sampling, why or f"sd-scripts' word is {old}")
    factor = float(draft.number("discrete_flow_shift", 3.0))
    if shift is None:
        draft.put("discrete_flow_shift", "flow.shift", factor if factor > 0 else "none")
    else:
        draft.set("flow.shift", shift, "timestep_sampling")
        draft.answer(
            "discrete_flow_shift", "ignored by the old trainer too", "", f"not used by timestep_sampling {old}"
        )
    if draft.number("t5xxl_max_token_length", 0):
        length = min(512, max(16, draft.integer("t5xxl_max_token_length", 512)))
        draft.put("t5xxl_max_token_length", "data.captions.text_length", length)
    given = draft.get("guidance_scale") not in (None, "")
    put_guidance(draft, "guidance_scale", draft.number("guidance_scale", 3.5) if given else 1)
    if not given:
        draft.notes["flow.guidance"] = (
            "what FLUX.1-Fill is sampled with; the old trainer's default, 3.5, is FLUX.1-dev's"
        )
