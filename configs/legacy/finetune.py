"""The older custom trainer of three folders, `job: train` with a process of type `finetune`, in our words."""

from typing import Any

from configs.legacy.amount import of_epochs
from configs.legacy.draft import Draft, Imported
from configs.legacy.words import CountPictures, begin_job, dataset_names, end_job, put_base, sides

_PARTS = "text encoders and VAE come with model.base"
_STAGES = (
    "all weights train from the first step: an expanded FLUX.1-dev starts at its own output, and a warm-up is enough"
)
_KNOWN = {
    "vae_path": _PARTS,
    "text_encoder_path": _PARTS,
    "text_encoder_2_path": _PARTS,
    "device": "`fluxfill train` uses every GPU; choose some by CUDA_VISIBLE_DEVICES",
    "two_stage_training": _STAGES,
    "stage1_steps": _STAGES,
    "stage1_lr": _STAGES,
    "stage2_lr": "two_stage_training is off",
    "training_folder": "",
    "performance_log_every": "metrics.jsonl has the seconds of every step",
}
_CENTRE = "it cropped every picture to a square; here pictures keep their shape, in buckets of about this area"


def import_finetune(tree: dict[str, Any], count_pictures: CountPictures) -> Imported:
    """Translate a job with a process of type finetune."""
    draft, at = begin_job(tree, "the `finetune` trainer", ("finetune",))
    put_base(draft, f"{at}.model_path", str(draft.get(f"{at}.model_path", "")))
    draft.set("method.type", "full", "it trained every weight of the transformer")
    _put_folders(draft, at)
    _put_train(draft, at, count_pictures)
    draft.drop_known(_KNOWN, f"{at}.")
    end_job(draft, tree, at)
    draft.really_did += [
        "It was no flow matching: the model was told time 0 and guidance 0, saw its inputs in another order, padded by "
        "zeros, and learned to hand out the target's latents, neither shifted nor scaled. Its weights are no start for "
        "FLUX.1-Fill, or for anything else. Take the pictures and the numbers, not the weights.",
        "It cropped pictures to squares, each by its own size, and only resized the masks: where they were not square, "
        "holes lay beside what they were to cover. Pictures without a mask were trained without a hole.",
        "It read captions beside the source; here they are read beside the target, where `fluxfill migrate` puts them.",
    ]
    return draft.finish(_KNOWN)


def _put_folders(draft: Draft, at: str) -> None:
    where = "data.datasets.0"
    folders = {role: draft.get(f"{at}.{role}_dir") for role in ("target_image", "source_image", "mask")}
    draft.set(f"{where}.name", dataset_names([str(folders["target_image"] or "pictures")])[0])
    for role, new_key, what in (
        ("target_image", "target", "the folder of the pictures to learn"),
        ("source_image", "source", ""),
        ("mask", "mask", "the folder of the masks, white: repaint"),
    ):
        key = f"{at}.{role}_dir"
        if isinstance(folders[role], str):
            draft.put(key, f"{where}.{new_key}", folders[role])
            continue
        draft.answer(key, "no equivalent", "", "no path of one folder")
        if what:
            draft.ask(f"{where}.{new_key}", what)
    if isinstance(folders["source_image"], str):
        draft.notes[f"{where}.source"] += (
            ": what the model sees around the hole. `fluxfill migrate` tells whether it is but the target with a hole"
        )
    draft.put(f"{at}.resolution", "data.resolution", sides(draft.numbers(f"{at}.resolution", 512)), _CENTRE)
    draft.set("data.captions.dropout", 0.0, "it left no caption out")


def _put_train(draft: Draft, at: str, count_pictures: CountPictures) -> None:
    batch, accumulation = draft.integer(f"{at}.batch_size", 1), draft.integer(f"{at}.gradient_accumulation_steps", 1)
    size = max(1, batch) * max(1, accumulation)
    why = f"batch_size {batch} x gradient_accumulation_steps {accumulation}"
    draft.put(f"{at}.batch_size", "train.global_batch_size", size, why if accumulation > 1 else "")
    draft.answer(f"{at}.gradient_accumulation_steps", "converted", f"train.global_batch_size: {size}", why)
    epochs = draft.integer(f"{at}.num_epochs", 10)
    folders = [draft.get(f"{at}.{role}_image_dir") for role in ("source", "target")]  # it went through the sources
    counts = (count_pictures(folder) for folder in folders if isinstance(folder, str))
    pictures = next((count for count in counts if count is not None), None)
    if draft.get(f"{at}.steps") is not None:
        draft.put(f"{at}.steps", "train.steps", draft.integer(f"{at}.steps", 1))
        draft.answer(f"{at}.num_epochs", "converted", "", "steps counts before it: a run is counted in train.steps")
    elif pictures:
        why = f"{epochs} epochs of {pictures} pictures, {size} an update"
        draft.put(f"{at}.num_epochs", "train.steps", of_epochs(epochs, pictures, size).steps, why)
    else:
        why = f"pictures x {epochs} epochs / {size}; the folder cannot be counted here, --pictures N says how many"
        draft.ask("train.steps", why)
        draft.answer(f"{at}.num_epochs", "no equivalent", "", why)
    lr_key = f"{at}.lr"
    if draft.flag(f"{at}.two_stage_training") and draft.get(f"{at}.stage2_lr") is not None:
        lr_key = f"{at}.stage2_lr"
        draft.answer(f"{at}.lr", "ignored by the old trainer too", "", "stage2_lr was the rate of all weights")
    draft.put(lr_key, "train.lr", float(draft.number(lr_key, 1e-5)))
    draft.set("train.lr_schedule", "constant", "it had no schedule")
    draft.set("train.warmup_steps", 0, "it had no warm-up")
    draft.set("train.optimizer", "adamw8bit", "two moments of 8 bits; of its optimizer the config says nothing")
