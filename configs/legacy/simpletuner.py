"""FLUX.1 training by SimpleTuner: config.json and its dataloader's file, in our words."""

from typing import Any

from configs.legacy.amount import accumulated, of_epochs
from configs.legacy.draft import Draft, Imported, known_keys
from configs.legacy.words import (
    FILL,
    CountPictures,
    dataset_names,
    precision_of,
    put_base,
    put_guidance,
    put_interval,
    put_optimizer,
    run_name,
    set_defaults,
    set_random_masks,
    sides,
)

_PARTS = "text encoders and VAE come with model.base"
_PROMPTS = "held-out pictures are filled, with their own captions and masks: data.holdout, validation.images"
_CACHE = "its caches cannot be read: pictures and captions are encoded once more, to data.cache"
_CROP = "pictures keep their shape, cropped at the centre to a bucket of about the area of data.resolution"
_UNUSED = (
    "not used: no dataset is paired with it as mask or reference_strict. Masks are a dataset's mask here, and what it "
    "shows in the target's place its source"
)
_HUB = "copy runs/<name>/final to the hub yourself"
_LOSS = "the loss is flow matching's squared error, weighed by flow.hole_weight and flow.keep_weight"
_MEMORY = "if memory is short: model.precision nf4 or int8"

KNOWN = known_keys(
    {
        "nothing here takes its place": (
            "model_flavour revision variant fuse_qkv_projections attention_mechanism lora_type "
            "lycoris_config lora_init_type lora_dropout peft_lora_mode ema_* optimizer_* gradient_precision "
            "grad_clip_method fuse_optimizer metadata_* skip_file_discovery scan_for_errors hash_filenames "
            "default text_embeds image_embeds conditioning_image_embeds type dataset_type conditioning_type "
            "conditioning_data source_dataset_id instance_data_dir only_instance_prompt "
            "prepend_instance_prompt caption_filter* aws_* disable_bucket_pruning allow_tf32 disable_tf32 "
            "i_know_what_i_am_doing num_train_epochs resolution repeats disabled "
            "accelerator_cache_clear_interval use_soft_min_snr controlnet control tread_*"
        ),
        _PARTS: "pretrained_vae_* pretrained_t5_* pretrained_transformer_* vae_dtype",
        "text encoders are never trained: their output is encoded once": (
            "text_encoder_?_precision text_encoder_lr train_text_encoder"
        ),
        _PROMPTS: (
            "validation_* user_prompt_library eval_* evaluation_type num_eval_images disable_benchmark "
            "num_validation_images"
        ),
        _CACHE: (
            "cache_dir* vae_cache_* write_batch_size read_batch_size compress_disk_cache vae_batch_size "
            "preserve_data_backend_cache override_dataset_config"
        ),
        _CROP: (
            "crop* aspect_bucket_* minimum_aspect_ratio maximum_aspect_ratio aspect_* maximum_image_size "
            "target_downsample_size resolution_type"
        ),
        "to leave out small pictures: data.min_side, in pixels": "minimum_image_size",
        "to leave out pictures that would be enlarged: data.max_enlarge": "max_upscale_threshold",
        _HUB: "push_to_hub* push_checkpoints_to_hub hub_model_id model_card_* publishing_config",
        "logging.trackers: tensorboard": "report_to tracker_* logging_dir webhook_* log_level",
        _LOSS: "loss_type huber_* snr_gamma snr_weight masked_loss_probability",
        "noise is drawn plainly": "noise_offset* offset_noise input_perturbation*",
        _MEMORY: (
            "gradient_checkpointing_interval base_model_default_dtype quantize_via quantize_activations "
            "offload_* musubi_* ramtorch* group_offload*"
        ),
        "which layers are adapted: method.targets": "flux_lora_target",
        "fixed here: AdamW's betas are 0.9 and 0.999, its eps 1e-8 (docs/methods.md)": (
            "adam_beta? optimizer_beta? adam_epsilon optimizer_config"
        ),
        "the schedule covers the whole run, once": "lr_num_cycles lr_power lr_end",
        "noise levels are drawn by flow.timestep_sampling and flow.shift": (
            "flow_sigmoid_scale flux_fast_schedule flow_use_beta_schedule flow_beta_*"
        ),
        "not FLUX.1-Fill's": "flux_attention_masked_training t5_padding flux_beta_schedule_*",
        "the same command goes on with a run, from its newest checkpoint": (
            "resume_from_checkpoint checkpointing_* save_* delete_*"
        ),
        "saves are counted in steps: checkpoint.every_steps, checkpoint.keep_last": (
            "checkpoint_step_interval checkpoint_epoch_interval checkpoints_*"
        ),
        "bf16 on a GPU: model.precision": "mixed_precision",
        "data.reader_threads is right as it is: nothing is decoded while training": (
            "num_workers max_workers dataloader_* torch_num_threads image_processing_*"
        ),
        "a dataset's share in the mix: data.datasets.0.weight": "data_backend_sampling probability",
        "captions are .txt or .caption files beside the pictures": "instance_prompt caption_strategy",
        "a run is counted in train.steps": "max_train_steps",
        "trained here like any other dataset: remove it, if it shows what is not to be painted": (
            "is_regularisation_data is_regularization_data"
        ),
    }
)
# Amounts of what is always done here: 0 is another amount, not none.
_ALWAYS = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "probability", "lr_power", "lr_num_cycles", "max_workers"),
    *("num_workers", "dataloader_num_workers", "validation_num_inference_steps"),
)
_DATA = "dataloader"
_SHIFT = 3.0  # the old trainer's default


def import_simpletuner(
    settings: dict[str, Any], dataloader: list[Any] | None, count_pictures: CountPictures
) -> Imported:
    """Translate config.json, whose keys may begin with --, and what its data_backend_config names, if it was found."""
    plain = {str(key).lstrip("-"): value for key, value in settings.items()}
    draft = Draft({**plain, **({_DATA: dataloader} if dataloader is not None else {})}, "SimpleTuner")
    output = str(draft.get("output_dir", "runs/imported")).replace("\\", "/").rstrip("/")
    parent, _, last = output.rpartition("/")
    name = run_name(last)
    set_defaults(draft, name)
    draft.set("run.name", name, "output_dir")
    draft.put("output_dir", "run.dir", parent or "runs", "its last part is the run's name")
    draft.put("seed", "run.seed", abs(draft.integer("seed", 42)) % 2**63)
    if str(draft.get("model_family", "flux")) == "flux":
        draft.answer("model_family", "taken", "always")
    else:
        draft.answer("model_family", "no equivalent", "", f"only FLUX.1 is trained: {FILL}")
    default = "black-forest-labs/FLUX.1-dev"
    trains = put_base(draft, "pretrained_model_name_or_path", str(draft.get("pretrained_model_name_or_path", default)))
    method = _put_network(draft)
    kind = str(draft.get("base_model_precision", "no_change"))
    precision, why = precision_of(method, kind != "no_change", kind)
    draft.put("base_model_precision", "model.precision", precision, why)
    samples = _put_datasets(draft, count_pictures)
    _put_train(draft, samples)
    if dataloader is not None:
        draft.answer("data_backend_config", "converted", "data.datasets", "its keys are listed here too")
    else:
        draft.drop("data_backend_config", "the file is not here: --data FILE names it")
    for prefix in {key[: key.rfind(".") + 1] for key in draft.open_keys()}:
        draft.drop_known(KNOWN, prefix, _ALWAYS)
    draft.really_did.append(
        "It trained FLUX.1 to make pictures from text: masks weighed the loss and were no input, so what came of it "
        f"does not fill holes. {trains}"
    )
    return draft.finish(KNOWN)


def _put_network(draft: Draft) -> str:
    method = "lora" if draft.get("model_type", "full") == "lora" else "full"
    lycoris = str(draft.get("lora_type", "standard")) == "lycoris"
    why = "the LyCORIS file is not read: if it is LoKr, set lokr" if lycoris and method == "lora" else ""
    draft.put("model_type", "method.type", method, why)
    if method == "full":
        for key in ("lora_rank", "lora_alpha"):
            draft.answer(key, "ignored by the old trainer too", "", "every weight is trained")
        return method
    rank = draft.integer("lora_rank", 16)
    draft.put("lora_rank", "method.rank", rank)
    draft.put("lora_alpha", "method.alpha", float(draft.number("lora_alpha", rank)))
    if isinstance(draft.get("init_lora"), str):
        draft.put("init_lora", "method.init_from", draft.get("init_lora"))
    return method


def _put_datasets(draft: Draft, count_pictures: CountPictures) -> int | None:
    """Translate the dataloader's entries of pictures; samples of an epoch, or None."""
    everything = [f"{_DATA}[{place}]" for place in range(draft.count(_DATA))]
    ids = {str(draft.get(f"{key}.id")): key for key in everything}
    keys = [
        key
        for key in everything
        if draft.get(f"{key}.dataset_type", "image") == "image" and not draft.flag(f"{key}.disabled")
    ]
    folders = [str(draft.get(f"{key}.instance_data_dir", "")) for key in keys]
    counts = [count_pictures(folder) if folder else None for folder in folders]
    repeats = [1 + draft.integer(f"{key}.repeats", 0) for key in keys]
    names = dataset_names([str(draft.get(f"{key}.id", "pictures")) for key in keys])
    for place, (key, name) in enumerate(zip(keys, names, strict=True)):
        where = f"data.datasets.{place}"
        draft.put(f"{key}.id", f"{where}.name", name)
        if draft.get(f"{key}.type", "local") == "local":
            draft.answer(f"{key}.type", "taken", "", "folders of this machine")
        if folders[place]:
            draft.put(f"{key}.instance_data_dir", f"{where}.target", folders[place])
        else:
            draft.ask(f"{where}.target", "the folder of the pictures; the old config names none on this machine")
        _put_conditions(draft, key, where, ids)
        if len(keys) > 1:
            known = None not in counts
            weight = float((counts[place] or 0) * repeats[place] if known else repeats[place]) or 1.0
            note = "the share in the mix: pictures x (repeats + 1)"
            note += "" if known else f". Put the number of pictures x {repeats[place]} here"
            draft.put(f"{key}.repeats", f"{where}.weight", weight, note)
        else:
            why = "of a single dataset repeats only make epochs longer, and a run is counted in steps"
            draft.answer(f"{key}.repeats", "converted", "", why)
        if draft.get(f"{key}.caption_strategy", "textfile") == "textfile":
            draft.answer(f"{key}.caption_strategy", "taken", "", "read beside the target")
    if not keys:
        draft.set("data.datasets.0.name", "pictures")
        why = "the folder of the pictures: the dataloader's file was not found, --data FILE names it"
        draft.ask("data.datasets.0.target", why)
        set_random_masks(draft, "data.datasets.0")
    _put_captions(draft, keys)
    _put_resolution(draft, keys)
    for key in everything:
        if key not in keys:
            kind = str(draft.get(f"{key}.dataset_type", "image"))
            is_used = kind == "conditioning" and draft.is_answered(f"{key}.instance_data_dir")
            why = "the masks or sources of another dataset" if is_used else _CACHE
            why = _UNUSED if kind == "conditioning" and not is_used else why
            why = "switched off" if draft.flag(f"{key}.disabled") else why
            for leaf in draft.open_keys(f"{key}."):
                draft.answer(leaf, "converted" if is_used else "no equivalent", "", why)
    if not keys:
        return count_pictures("")  # those that are told
    if None in counts:
        return None
    return sum((count or 0) * times for count, times in zip(counts, repeats, strict=True))


def _put_conditions(draft: Draft, key: str, where: str, ids: dict[Any, str]) -> None:
    """The masks and sources that a dataset is paired with, by the ids of their entries."""
    paired = draft.get(f"{key}.conditioning_data")
    entries = [ids[name] for one in (paired if isinstance(paired, list) else [paired]) if (name := str(one)) in ids]
    of_kind = {str(draft.get(f"{at}.conditioning_type")): f"{at}.instance_data_dir" for at in entries}
    masks, sources = of_kind.get("mask", ""), of_kind.get("reference_strict", "")
    if isinstance(draft.get(masks), str):
        _put_folder(draft, masks, f"{where}.mask", "white is the hole; it weighed the loss")
    elif isinstance(draft.get(sources), str):
        what = "the folder of the masks, white: repaint; the old run had none. `fluxfill migrate` finds what differs"
        draft.ask(f"{where}.mask", f"{what} between source and target")
    else:
        set_random_masks(draft, where)
        return
    if isinstance(draft.get(sources), str):
        _put_folder(draft, sources, f"{where}.source", "what the model sees in place of the target")
    draft.answer(f"{key}.conditioning_data", "converted", f"{where}.mask, source", "the folders of those datasets")


def _put_folder(draft: Draft, key: str, new_key: str, why: str) -> None:
    """Set a folder, which several datasets may share."""
    if draft.is_answered(key):
        draft.set(new_key, draft.get(key), f"{key}: {why}")
    else:
        draft.put(key, new_key, draft.get(key), why)


def _put_captions(draft: Draft, keys: list[str]) -> None:
    prompts = [key for key in keys if draft.get(f"{key}.instance_prompt")]
    if prompts:
        why = "the caption of pictures that have none beside them, of all datasets"
        first = f"{prompts[0]}.instance_prompt"
        draft.put(first, "data.captions.default", str(draft.get(first)), why)
    elif draft.get("instance_prompt"):
        draft.put("instance_prompt", "data.captions.default", str(draft.get("instance_prompt")))
    dropout = float(draft.number("caption_dropout_probability", 0.0))
    draft.put("caption_dropout_probability", "data.captions.dropout", dropout)
    if draft.get("caption_dropout_probability") is None:
        draft.notes["data.captions.dropout"] = (
            "the default of the old trainer's releases up to 2; of later ones some leave out a tenth: 0.1"
        )
    if draft.get("tokenizer_max_length") is not None:
        length = min(512, max(16, draft.integer("tokenizer_max_length", 512)))
        draft.put("tokenizer_max_length", "data.captions.text_length", length)


def _put_resolution(draft: Draft, keys: list[str]) -> None:
    places = [key for key in keys if draft.get(f"{key}.resolution") is not None]

    def side(key: str, kind: str) -> float:
        value = float(draft.number(key, 1024))
        return float(abs(value * 1_000_000) ** 0.5) if kind == "area" else value  # of megapixels

    kind = str(draft.get("resolution_type", "pixel_area"))
    found = [side(f"{key}.resolution", str(draft.get(f"{key}.resolution_type", kind))) for key in places]
    together = sides(found or [side("resolution", kind)])
    draft.set("data.resolution", together, "resolution")
    if len(together) > 1:
        draft.set(
            "data.resolution_policy", "each", "the datasets had different ones; here each picture is taken at each"
        )
    for key in (*(f"{key}.resolution" for key in places), "resolution"):
        draft.answer(key, "converted", f"data.resolution: {together}", "the side of a square of that area")


def _put_train(draft: Draft, samples: int | None) -> None:
    batch, accumulation = draft.integer("train_batch_size", 4), max(1, draft.integer("gradient_accumulation_steps", 1))
    steps, epochs = draft.integer("max_train_steps", 0), draft.integer("num_train_epochs", 0)
    size = accumulated(steps, batch, accumulation).global_batch_size
    if steps > 0:
        draft.put("max_train_steps", "train.steps", steps)
        draft.answer("num_train_epochs", "taken", "off", "steps count before it")
    elif samples and epochs:
        why = f"{epochs} epochs of {samples} samples, {size} an update"
        draft.put("num_train_epochs", "train.steps", of_epochs(epochs, samples, size).steps, why)
    else:
        why = f"pictures x repeats x {epochs} epochs / {size}; the folders cannot be counted here, --pictures N says it"
        draft.ask("train.steps", why)
        draft.answer("num_train_epochs", "no equivalent", "", why)
    why = f"samples per update on one GPU: batch {batch} x gradient_accumulation_steps {accumulation}"
    draft.set("train.global_batch_size", size, why)
    draft.answer("train_batch_size", "converted", f"train.global_batch_size: {size}", why)
    draft.answer("gradient_accumulation_steps", "converted", f"train.global_batch_size: {size}", why)
    optimizer = str(draft.get("optimizer", "adamw_bf16"))
    put_optimizer(draft, "optimizer", optimizer, "learning_rate", draft.number("learning_rate", 4e-7))
    draft.put("adam_weight_decay", "train.weight_decay", float(draft.number("adam_weight_decay", 0.01)))
    draft.put("max_grad_norm", "train.max_grad_norm", float(draft.number("max_grad_norm", 2.0)) or None)
    draft.put("gradient_checkpointing", "train.activation_checkpointing", draft.flag("gradient_checkpointing"))
    schedule = str(draft.get("lr_scheduler", "constant"))
    ours = (
        schedule if schedule in ("constant", "linear", "cosine") else "linear" if schedule == "polynomial" else "cosine"
    )
    ours = "constant" if schedule == "constant_with_warmup" else ours
    draft.put("lr_scheduler", "train.lr_schedule", ours, "" if ours == schedule else f"there is no {schedule}")
    warmup = draft.integer("lr_warmup_steps", 0)
    most = draft.config["train"].get("steps")
    fits = min(warmup, most - 1) if isinstance(most, int) else warmup
    draft.put("lr_warmup_steps", "train.warmup_steps", fits, "" if fits == warmup else "fewer than there are steps")
    if draft.flag("use_ema"):
        draft.put("ema_decay", "train.ema_decay", float(draft.number("ema_decay", 0.995)))
        draft.answer("use_ema", "taken", "train.ema_decay")
    else:
        draft.put("use_ema", "train.ema_decay", None)
    if draft.get("lr_scheduler") is None:
        draft.notes["train.lr_schedule"] = (
            "as the old trainer's newest releases, by default; earlier ones had sine, to which cosine is nearest"
        )
    if draft.get("lr_warmup_steps") is None:
        draft.notes["train.warmup_steps"] = "as the old trainer's newest releases, by default; earlier ones had 500"
    _put_flow(draft)
    for section, keys in (
        ("checkpoint", ("checkpoint_step_interval", "checkpointing_steps", "checkpoint_epoch_interval")),
        ("validation", ("validation_step_interval", "validation_steps", "validation_epoch_interval")),
    ):
        put_interval(draft, keys[:-1], keys[-1], f"{section}.every_steps", samples, size)
    limit = draft.integer("checkpoints_total_limit", 1)
    if "checkpoints_total_limit" in draft.leaves:
        why = "" if limit > 0 else "0 stands for no limit"
        draft.put("checkpoints_total_limit", "checkpoint.keep_last", limit if limit > 0 else None, why)
    if draft.number("validation_num_inference_steps", 0) > 0:
        sampler_steps = draft.integer("validation_num_inference_steps", 1)
        draft.put("validation_num_inference_steps", "validation.sampler_steps", sampler_steps)


def _put_flow(draft: Draft) -> None:
    uniform = next((key for key in ("flow_use_uniform_schedule", "flux_use_uniform_schedule") if draft.flag(key)), None)
    if uniform:
        draft.put(uniform, "flow.timestep_sampling", "uniform", "uniform sigmas")
    else:
        draft.set("flow.timestep_sampling", "logit_normal", "the old trainer's default")
    _put_shift(draft)
    key = next((key for key in ("flux_guidance_value", "flow_guidance_value") if draft.get(key) is not None), "")
    put_guidance(draft, key or "flux_guidance_value", draft.number(key, 1.0) if key else 1.0)
    for key in ("flux_guidance_mode", "flux_guidance_min", "flux_guidance_max"):
        if draft.get(key) == "constant":
            draft.answer(key, "taken", "always", "flow.guidance is one number")
        else:
            draft.drop(key, "flow.guidance is one number")


def _put_shift(draft: Draft) -> None:
    auto = [key for key in ("flow_schedule_auto_shift", "flux_schedule_auto_shift") if draft.flag(key)]
    given = [key for key in ("flow_schedule_shift", "flux_schedule_shift") if draft.get(key) is not None]
    fixed = given[0] if given else "flow_schedule_shift"
    shift = float(draft.number(fixed, _SHIFT))
    if shift > 0 and (given or not auto):
        draft.put(fixed, "flow.shift", shift)
        for key in auto:
            draft.answer(key, "ignored by the old trainer too", "", f"{fixed} counts before it")
        return
    if not auto:
        draft.put(fixed, "flow.shift", "none", "0 shifts nothing")
        return
    draft.put(auto[0], "flow.shift", "dynamic", "by the picture's size")
    draft.answer(fixed, "taken", "off", "off here too")
    if not given:
        draft.really_did.append(
            f"{auto[0]} counts only with flow_schedule_shift 0, and by itself that is {_SHIFT:g}: the noise was moved "
            f"by {_SHIFT:g}, or the trainer refused the two. Here it is moved by the picture's size, as was meant; for "
            f"what the old run did: flow.shift={_SHIFT:g}."
        )
