"""How an ai-toolkit job trained: steps, batches, optimizer, noise levels."""

from configs.errors import InputError
from configs.legacy.amount import Amount, accumulated, every, of_epochs, thrown_away
from configs.legacy.draft import Draft
from configs.legacy.words import put_guidance, put_optimizer

_NOT_TRAINED = "the text encoders are never trained: their output is encoded once"
_LOSS = "the loss is flow matching's squared error, weighed by flow.hole_weight and flow.keep_weight"

KNOWN = {
    "dtype": "bf16 on a GPU: model.precision",
    "train_unet": "the transformer is what is trained",
    "train_text_encoder": _NOT_TRAINED,
    "train_refiner": "FLUX.1 has no refiner",
    "train_turbo": "turbo training is not FLUX.1-Fill's",
    "noise_scheduler": "FLUX.1 is trained by flow matching alone",
    "linear_timesteps*": "the loss is not weighed by noise level: flow.timestep_sampling",
    "content_or_style*": "noise levels are drawn by flow.timestep_sampling and flow.shift",
    "min_denoising_steps": "all noise levels are trained: flow.timestep_sampling",
    "max_denoising_steps": "all noise levels are trained: flow.timestep_sampling",
    "text_encoder_lr": _NOT_TRAINED,
    "embedding_lr": "no embeddings are trained",
    "adapter_lr": "one rate counts for all: train.lr",
    "refiner_lr": "FLUX.1 has no refiner",
    "optimizer_params.*": "fixed here: AdamW's betas are 0.9 and 0.999, its eps 1e-8 (docs/methods.md)",
    "lr_scheduler_params.*": "the schedule covers the whole run: train.lr_schedule, warmup_steps, lr_final_fraction",
    "ema_config.*": "the average is train.ema_decay alone",
    "loss_type": _LOSS,
    "loss_target": _LOSS,
    "do_cfg": "FLUX.1 is told its guidance: flow.guidance",
    "do_random_cfg": "FLUX.1 is told its guidance: flow.guidance",
    "cfg_rescale": "FLUX.1 is told its guidance: flow.guidance",
    "bypass_guidance_embedding": "FLUX.1-Fill is told its guidance: flow.guidance",
    "prompt_dropout_prob": "data.captions.dropout has it from the datasets",
    "noise_*": "noise is drawn plainly",
    "random_noise_*": "noise is drawn plainly",
    "dynamic_noise_offset": "noise is drawn plainly",
    "img_multiplier": "latents are scaled as FLUX's VAE says",
    "latent_multiplier": "latents are scaled as FLUX's VAE says",
    "snr_gamma": "of no use in flow matching",
    "min_snr_gamma": "of no use in flow matching",
    "learnable_snr_gos": "of no use in flow matching",
    "inverted_mask_prior*": "to keep what is outside the hole as the base has it: flow.keep_target=base",
    "diff_output_preservation*": "give a dataset of its own for what is to be preserved, with a weight",
    "blank_prompt_preservation*": "data.captions.dropout trains without a caption",
    "reg_weight": "give the regularisation dataset a weight: data.datasets.0.weight",
    "skip_first_sample": "pictures are first sampled at validation.every_steps",
    "force_first_sample": "pictures are first sampled at validation.every_steps",
    "do_paramiter_swapping": "adapters train all their parameters",
    "paramiter_swapping_factor": "adapters train all their parameters",
    "start_step": "a run goes on from its newest checkpoint by itself",
    "attention_backend": "PyTorch's own attention is used",
    "do_differential_guidance": "not used",
    "differential_guidance_scale": "not used",
    "max_loss": "updates that are not finite are skipped by themselves",
    "validation_config.*": "held-out pictures are used: data.holdout, validation.every_steps, validation.images",
    "xformers": "PyTorch's own attention is used",
    "sdp": "PyTorch's own attention is used",
    "free_u": "not used",
    "merge_network_on_save": "`fluxfill export --format merged` writes the base with the adapter in it",
    "single_item_batching": "micro-batches hold pictures of one size",
    "negative_prompt": "FLUX.1 has no negative prompts",
    "feature_extractor*": "not used",
    "correct_pred_norm*": "not used",
    "target_noise_multiplier": "noise is drawn plainly",
    "match_adapter*": "not used",
    "switch_boundary_every": "FLUX.1 is one model",
}

# ai-toolkit's word -> ours: how sigma is drawn, its shift, and what is different.
_TIMESTEPS = {
    "sigmoid": ("logit_normal", "none", ""),
    "linear": ("uniform", "none", ""),
    "flux_shift": ("uniform", "dynamic", "uniform, then shifted by the picture's size, drawn without a table of 1000"),
    "shift": ("uniform", "dynamic", "uniform, then shifted by the picture's size"),
    "lumina2_shift": ("uniform", "dynamic", "uniform, then shifted by the picture's size, as FLUX.1 is"),
    "weighted": ("uniform", "none", "drawn alike, but the loss is not weighed by noise level"),
    "lognorm_blend": ("logit_normal", "none", "without the uniform part of the blend"),
}
_NOT_DRAWN = ("logit_normal", "dynamic", "distillation's noise levels are not drawn: these are the default ones")


def put_train(draft: Draft, at: str, samples_per_epoch: int | None) -> int:
    """Translate the block `train` at the old key `at`; returns the old steps that make one update."""
    steps_per_update = _put_amount(draft, at, samples_per_epoch)
    _put_optimizer(draft, at, steps_per_update)
    _put_flow(draft, at)
    _put_ema(draft, at)
    checkpointing = draft.flag(f"{at}.gradient_checkpointing", True)
    draft.put(f"{at}.gradient_checkpointing", "train.activation_checkpointing", checkpointing)
    if draft.number(f"{at}.prompt_dropout_prob", 0.0) and not draft.config["data"]["captions"].get("dropout"):
        dropout = float(draft.number(f"{at}.prompt_dropout_prob", 0.0))
        draft.put(f"{at}.prompt_dropout_prob", "data.captions.dropout", dropout)
    for key in ("cache_text_embeddings", "unload_text_encoder"):
        draft.drop_always(f"{at}.{key}", "text is encoded before training, and no encoder stays loaded")
    for key, always in _ALWAYS.items():
        if draft.get(f"{at}.{key}") == always:
            draft.answer(f"{at}.{key}", "taken", "always", KNOWN.get(key, ""))
    draft.answer(
        f"{at}.is_inpainting", "ignored by the old trainer too", "", "no key of its; here every run fills holes"
    )
    draft.drop_known(KNOWN, f"{at}.", _AMOUNTS)
    return steps_per_update


# What is always done here, and amounts of it: false and 0 are something else, not off here too.
_AMOUNTS = (
    *("train_unet", "skip_first_sample", "reg_weight", "img_multiplier", "latent_multiplier", "max_denoising_steps"),
    *("target_noise_multiplier", "differential_guidance_scale"),
)
_ALWAYS = {
    "train_unet": True,
    "noise_scheduler": "flowmatch",
    "content_or_style": "balanced",
    "min_denoising_steps": 0,
    "max_denoising_steps": 999,
    "loss_type": "mse",
    "attention_backend": "native",
    "reg_weight": 1,
}


def _put_amount(draft: Draft, at: str, samples_per_epoch: int | None) -> int:
    steps, batch = draft.integer(f"{at}.steps", 1000), draft.integer(f"{at}.batch_size", 1)
    proper, legacy = (
        draft.integer(f"{at}.gradient_accumulation", 1),
        draft.integer(f"{at}.gradient_accumulation_steps", 1),
    )
    old_key = f"{at}.gradient_accumulation_steps"
    if proper != 1 and legacy != 1:
        raise InputError(
            f"{at} has both gradient_accumulation and gradient_accumulation_steps, which the old trainer refuses too. "
            "Remove one of the two, and import it again."
        )
    if -1 in (proper, legacy):  # an update per epoch
        key = old_key if legacy == -1 else f"{at}.gradient_accumulation"
        return _put_epochs(draft, at, key, steps, batch, samples_per_epoch)
    if min(proper, legacy) < 1:
        proper, legacy = max(1, proper), max(1, legacy)
    if legacy == 1:
        amount = accumulated(steps, batch, proper)
        draft.put(f"{at}.steps", "train.steps", amount.steps)
        why = f"samples per update: batch_size {batch} x gradient_accumulation {proper}"
        draft.put(f"{at}.batch_size", "train.global_batch_size", amount.global_batch_size, why if proper > 1 else "")
        size = f"train.global_batch_size: {amount.global_batch_size}"
        draft.answer(f"{at}.gradient_accumulation", "taken" if proper == 1 else "converted", size, why)
        draft.answer(old_key, "taken", "off", "off here too")
        return 1
    did, meant = thrown_away(steps, batch, legacy)
    draft.put(f"{at}.steps", "train.steps", did.steps, f"its steps counted batches, {legacy} of which made one update")
    draft.put(f"{at}.batch_size", "train.global_batch_size", did.global_batch_size)
    intent = f"for the batch that was meant: train.global_batch_size={meant.global_batch_size}, with the same steps"
    why = f"it zeroed gradients before each batch, so {legacy - 1} of {legacy} were thrown away; {intent}"
    draft.notes["train.global_batch_size"] = f"what an update of the old run was made of; {intent}"
    draft.answer(
        old_key, "converted", f"train.steps: {did.steps}, train.global_batch_size: {did.global_batch_size}", why
    )
    draft.answer(f"{at}.gradient_accumulation", "taken", "off", "off here too")
    draft.really_did.append(
        f"gradient_accumulation_steps {legacy} accumulated nothing: the trainer zeroed gradients before every batch. "
        f"Of the {meant.samples:,} samples that went through the model, {did.samples:,} reached the weights, in "
        f"{did.steps:,} updates of {batch}. The new config repeats these updates, at 1/{legacy} of the cost; {intent} "
        f"(the cost of the old run)."
    )
    return legacy


def _put_epochs(draft: Draft, at: str, key: str, steps: int, batch: int, samples: int | None) -> int:
    """Translate an accumulation of -1, an update an epoch; returns the old steps that make one update.

    samples: of an epoch; where they cannot be counted, what follows from them is asked for.
    """
    keeps = key.endswith("accumulation")
    draft.answer(f"{at}.gradient_accumulation{'_steps' if keeps else ''}", "taken", "off", "off here too")
    if samples is None:
        why = (
            "-1 was one update an epoch, and the pictures cannot be counted here: --pictures N says how many there are"
        )
        draft.answer(key, "no equivalent", "", why)
        if keeps:
            draft.put(f"{at}.steps", "train.steps", steps)
            draft.ask("train.global_batch_size", why)
            draft.answer(f"{at}.batch_size", "no equivalent", "", why)
        else:
            draft.ask("train.steps", why)
            draft.answer(f"{at}.steps", "no equivalent", "", why)
            draft.put(f"{at}.batch_size", "train.global_batch_size", batch)
        return 1
    batches = of_epochs(1, samples, batch).steps
    amount = Amount(steps, samples) if keeps else thrown_away(steps, batch, batches)[0]
    why = f"-1 was one update an epoch, of {batches} batches" + ("" if keeps else ", all but the last thrown away")
    draft.put(f"{at}.steps", "train.steps", amount.steps, why)
    draft.put(f"{at}.batch_size", "train.global_batch_size", amount.global_batch_size, why if keeps else "")
    draft.answer(key, "converted", f"train.global_batch_size: {amount.global_batch_size}", why)
    return 1 if keeps else batches


def _put_optimizer(draft: Draft, at: str, steps_per_update: int) -> None:
    lr = draft.number(f"{at}.lr", 1e-6)
    lr_key = f"{at}.lr"
    if draft.get(f"{at}.unet_lr") is not None:
        lr_key, lr = f"{at}.unet_lr", draft.number(f"{at}.unet_lr", lr)
        draft.answer(f"{at}.lr", "converted", "", "unet_lr was the transformer's rate")
    old = str(draft.get(f"{at}.optimizer", "adamw"))
    optimizer = put_optimizer(draft, f"{at}.optimizer", old, lr_key, lr)
    decay = draft.number(f"{at}.optimizer_params.weight_decay", 0.01 if optimizer.startswith("adamw") else 0.0)
    draft.put(f"{at}.optimizer_params.weight_decay", "train.weight_decay", float(decay))
    norm = draft.number(f"{at}.max_grad_norm", 1.0)
    draft.put(f"{at}.max_grad_norm", "train.max_grad_norm", float(norm) or None)
    _put_schedule(draft, at, lr, steps_per_update)


def _put_schedule(draft: Draft, at: str, lr: float, steps_per_update: int) -> None:
    old, key = str(draft.get(f"{at}.lr_scheduler", "constant")), f"{at}.lr_scheduler"
    parameters = f"{at}.lr_scheduler_params"
    if old == "linear":
        why = "it rose from a third to the whole, and soon (torch's LinearLR): here warmup_steps would rise from zero"
        draft.put(key, "train.lr_schedule", "constant", why)
    elif old in ("constant", "cosine"):
        draft.put(key, "train.lr_schedule", old)
    elif old == "constant_with_warmup":
        draft.put(key, "train.lr_schedule", "constant", "its warm-up is train.warmup_steps")
    elif old.startswith("cosine"):
        draft.put(key, "train.lr_schedule", "cosine", "once over the run, without restarts")
    else:
        draft.put(key, "train.lr_schedule", "constant", f"there is no {old}: constant, linear and cosine")
    floor = draft.number(f"{parameters}.eta_min", 0.0)
    if floor and lr:
        why = "eta_min / lr"
        draft.put(f"{parameters}.eta_min", "train.lr_final_fraction", min(1.0, round(floor / lr, 6)), why)
    warmup = draft.integer(f"{parameters}.num_warmup_steps", 1000 if old == "constant_with_warmup" else 0)
    steps = draft.config["train"].get("steps")
    updates = warmup // steps_per_update
    if isinstance(steps, int) and updates >= steps:
        updates = max(0, steps - 1)
    why = "in updates, and fewer than there are steps" if updates != warmup else ""
    draft.put(f"{parameters}.num_warmup_steps", "train.warmup_steps", updates, why)


def _put_flow(draft: Draft, at: str) -> None:
    old = str(draft.get(f"{at}.timestep_type", "sigmoid"))
    if draft.flag(f"{at}.linear_timesteps") or draft.flag(f"{at}.linear_timesteps2"):
        old = "weighted"
    sampling, shift, why = _TIMESTEPS.get(old, _NOT_DRAWN)
    draft.put(f"{at}.timestep_type", "flow.timestep_sampling", sampling, why or f"ai-toolkit's word is {old}")
    note = "as the old run" if shift == "none" else "by the picture's size, as FLUX.1 samples"
    draft.set("flow.shift", shift, note + ("; dynamic is as FLUX.1 samples" if shift == "none" else ""))
    put_guidance(draft, f"{at}.cfg_scale", draft.number(f"{at}.cfg_scale", 1.0))


def _put_ema(draft: Draft, at: str) -> None:
    uses, key = draft.flag(f"{at}.ema_config.use_ema"), f"{at}.ema_config.ema_decay"
    if uses:
        draft.put(key, "train.ema_decay", float(draft.number(key, 0.999)))
        draft.answer(f"{at}.ema_config.use_ema", "taken", "train.ema_decay")
        return
    draft.set("train.ema_decay", None, "no average was kept")
    draft.answer(f"{at}.ema_config.use_ema", "taken", "train.ema_decay: null")
    if key in draft.leaves:
        draft.answer(key, "ignored by the old trainer too", "", "without use_ema: true it kept no average")
        draft.really_did.append("It kept no moving average: ema_decay counts only with use_ema: true.")


def interval(draft: Draft, key: str, default: int, steps_per_update: int) -> tuple[int | None, str]:
    """(an old interval in updates, None for 0, which was never; why it is another number)."""
    old = draft.integer(key, default)
    if old <= 0:
        return None, "off"
    updates = every(old, steps_per_update)
    return updates, "" if updates == old else f"its steps counted batches, {steps_per_update} of which made one update"
