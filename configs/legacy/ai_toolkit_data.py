"""The datasets of an ai-toolkit job."""

from dataclasses import dataclass

from configs.legacy.draft import Draft
from configs.legacy.words import CountPictures, dataset_names, set_random_masks, sides

_MIGRATE = "`fluxfill migrate` looks at the pixels and makes the masks"

KNOWN = {
    "type": "only pictures are trained on",
    "caption_type": "captions are read beside the pictures, as .txt or .caption",
    "random_triggers*": "give one trigger: data.captions.trigger",
    "token_dropout_rate": "captions are encoded once, so their words stay: data.captions.dropout leaves out whole ones",
    "shuffle_tokens": "captions are encoded once, in the order they are written",
    "keep_tokens": "captions are encoded once, in the order they are written",
    "use_short_captions": "write the caption that is to be used beside the picture",
    "replacements*": "replace the words in the caption files",
    "bucket*": "pictures always go to buckets of equal area, in steps of 16 pixels",
    "scale": "set data.resolution",
    "random_scale": "pictures are encoded once: give several resolutions, with data.resolution_policy=each",
    "random_crop": "pictures are encoded once, cropped at the centre",
    "square_crop": "pictures keep their shape: crop the files, if they have to be square",
    "flip_y": "only mirror images are made: data.datasets.0.flip",
    "network_weight": "give the dataset a lower data.datasets.0.weight",
    "loss_multiplier": "give the dataset another data.datasets.0.weight",
    "cache_clip_vision_to_disk": "FLUX.1-Fill has no CLIP vision",
    "cache_latents_num_workers": "`fluxfill preprocess` uses every GPU and core",
    "augment*": "pictures are encoded once: write changed copies of the files, if they are to be changed",
    "control_path*": "a picture to paint from goes with masks here: give it as source, beside mask",
    "control_from_same_folder": "give a folder of sources: data.datasets.0.source",
    "full_size_control_images": "a source is as large as its target",
    "control_transparent_color*": "a source has no transparency: put it on a colour",
    "controls*": "depth, line and pose pictures are not used",
    "unconditional_path": "there is no unconditional training",
    "clip_image_path": "there is no picture prompt",
    "clip_image_from_same_folder": "there is no picture prompt",
    "inpaint_path": "holed pictures are made from target and mask; others are sources: `fluxfill migrate` tells",
    "alpha_mask": f"{_MIGRATE} from transparent pictures",
    "num_workers": "data.reader_threads is right as it is: nothing is decoded while training",
    "prefetch_factor": "decided by the reader",
    "fast_image_size": "headers are always read alone",
    "standardize_images": "pictures are read as they are",
    "poi": "crop the files to what matters",
    "num_frames": "only pictures are trained on",
    "shrink_video_to_frames": "only pictures are trained on",
    "fps": "only pictures are trained on",
    "do_i2v": "only pictures are trained on",
    "do_audio": "only pictures are trained on",
    "audio*": "only pictures are trained on",
    "prior_reg": "trained here like any other dataset: remove it, if it shows what is not to be painted",
    "is_reg": "trained here like any other dataset: remove it, if it shows what is not to be painted",
    "batch_size": "one batch size counts for all datasets: train.global_batch_size",
    "extra_values*": "not used by FLUX",
}


# What is always done here; and amounts, of which 0 is another one, not none.
_ALWAYS = (
    *(
        "buckets",
        "bucket_tolerance",
        "full_size_control_images",
        "fast_image_size",
        "network_weight",
        "loss_multiplier",
    ),
    *("num_workers", "prefetch_factor", "scale"),
)


@dataclass(frozen=True)
class DataFacts:
    """What the datasets say of the run.  samples: of an epoch; None where the folders cannot be counted, or are
    empty."""

    has_masks: bool
    has_inpaint: bool
    samples: int | None


def put_datasets(draft: Draft, at: str, count_pictures: CountPictures) -> DataFacts:
    """Translate the datasets below the old key `at`, a process; asks for the folders where there are none."""
    number = draft.count(f"{at}.datasets")
    keys = [f"{at}.datasets[{place}]" for place in range(number)]
    folders = [str(draft.get(f"{key}.folder_path") or draft.get(f"{key}.dataset_path") or "") for key in keys]
    resolutions = [_resolution(draft, key) for key in keys]
    samples = []
    for key, folder, resolution in zip(keys, folders, resolutions, strict=True):
        pictures = count_pictures(folder) if folder else None
        samples.append(pictures and pictures * draft.integer(f"{key}.num_repeats", 1) * len(resolution))
    for place, (key, name) in enumerate(zip(keys, dataset_names(folders), strict=True)):
        _put_dataset(draft, key, f"data.datasets.{place}", name, folders[place], samples, place)
    if not keys:
        draft.set("data.datasets.0.name", "pictures")
        draft.ask("data.datasets.0.target", "the folder of the pictures; the old config names none")
        set_random_masks(draft, "data.datasets.0")
    _put_resolution(draft, keys, resolutions)
    _put_captions(draft, at, keys)
    for key in keys:
        for name in ("cache_latents", "cache_latents_to_disk", "cache_text_embeddings"):
            draft.drop_always(f"{key}.{name}", "data.mode: cached: pictures and captions are encoded once, to disk")
        draft.drop_known(KNOWN, f"{key}.", _ALWAYS)
    return DataFacts(
        has_masks=any(draft.get(f"{key}.mask_path") for key in keys),
        has_inpaint=any(draft.get(f"{key}.inpaint_path") for key in keys),
        samples=None if None in samples else sum(count for count in samples if count) or None,
    )


def _put_dataset(
    draft: Draft, key: str, where: str, name: str, folder: str, samples: list[int | None], place: int
) -> None:
    draft.set(f"{where}.name", name)
    given = "folder_path" if draft.get(f"{key}.folder_path") else "dataset_path"
    if folder.lower().endswith(".json"):
        why = "a JSON list of pictures is not read: write it as .jsonl, and give it as table; or give the folder here"
        draft.ask(f"{where}.target", why)
        draft.answer(f"{key}.{given}", "no equivalent", "", why)
    elif folder:
        draft.put(f"{key}.{given}", f"{where}.target", folder)
    else:
        draft.ask(f"{where}.target", "the folder of the pictures; the old config names none")
    _put_mask(draft, key, where)
    if draft.get(f"{key}.flip_x") is not None:
        draft.put(f"{key}.flip_x", f"{where}.flip", draft.flag(f"{key}.flip_x"))
    if draft.flag(f"{key}.buckets", True):
        draft.answer(f"{key}.buckets", "taken", "always", "pictures always go to buckets of equal area")
    _answer_if(draft, f"{key}.type", "image", "only pictures are trained on")
    _answer_if(draft, f"{key}.scale", 1, "pictures are scaled to data.resolution")
    for same in ("network_weight", "loss_multiplier"):
        _answer_if(draft, f"{key}.{same}", 1, "every sample counts as 1, times the dataset's weight")
    _put_weight(draft, key, where, samples, place)


def _answer_if(draft: Draft, key: str, value: object, why: str) -> None:
    if draft.get(key) == value:
        draft.answer(key, "taken", "always", why)


def _put_mask(draft: Draft, key: str, where: str) -> None:
    mask, control = draft.get(f"{key}.mask_path"), draft.get(f"{key}.control_path")
    inverted = draft.flag(f"{key}.invert_mask")
    if not isinstance(mask, str):
        if draft.get(f"{key}.inpaint_path") or draft.flag(f"{key}.alpha_mask"):
            draft.ask(f"{where}.mask", f"the folder of the masks: {_MIGRATE} from transparent pictures")
        else:
            set_random_masks(draft, where)
        draft.drop(f"{key}.invert_mask", "there is no mask_path whose masks it could invert")
        draft.drop(f"{key}.mask_min_value", "there is no mask_path whose masks it could weigh")
        return
    if inverted:
        why = "black is the hole, if it is pure black (0); of JPEG masks it is not: `fluxfill migrate` turns them round"
        draft.put(f"{key}.mask_path", f"{where}.mask", {"folder": mask, "label": 0}, why)
        draft.answer(f"{key}.invert_mask", "converted", f"{where}.mask.label: 0", why)
    else:
        draft.put(f"{key}.mask_path", f"{where}.mask", mask)
        draft.notes[f"{where}.mask"] += ": white is what is repainted; `fluxfill migrate` checks that"
        draft.answer(f"{key}.invert_mask", "taken", "", "white is the hole")
    lowest = float(draft.number(f"{key}.mask_min_value", 0.0))
    kept = draft.config.get("flow", {}).get("keep_weight")
    if f"{key}.mask_min_value" not in draft.leaves:
        pass
    elif kept is None:
        draft.put(f"{key}.mask_min_value", "flow.keep_weight", lowest)
    elif kept == lowest:
        draft.answer(f"{key}.mask_min_value", "taken", f"flow.keep_weight: {kept}")
    else:
        draft.answer(f"{key}.mask_min_value", "no equivalent", "", f"one value counts for all datasets: {kept}")
    if isinstance(control, str):
        why = "what the model sees in the place of the target; the old trainer's FLUX.1 never looked at it"
        draft.put(f"{key}.control_path", f"{where}.source", control, why)


def _put_weight(draft: Draft, key: str, where: str, samples: list[int | None], place: int) -> None:
    repeats = draft.integer(f"{key}.num_repeats", 1)
    if len(samples) == 1:
        why = "of a single dataset repeats only make epochs longer, and a run is counted in steps"
        draft.answer(f"{key}.num_repeats", "taken" if repeats == 1 else "converted", "", why)
    elif None in samples:
        why = f"the share in the mix: pictures x repeats. Put the number of pictures x {repeats} here"
        draft.put(f"{key}.num_repeats", f"{where}.weight", float(repeats), why)
        if f"{key}.num_repeats" not in draft.leaves:
            draft.notes[f"{where}.weight"] = why
    else:
        why = "the share in the mix: pictures x repeats x resolutions"
        draft.put(f"{key}.num_repeats", f"{where}.weight", float(samples[place] or 1), why)


def _resolution(draft: Draft, key: str) -> list[int]:
    return sides(draft.numbers(f"{key}.resolution", 512))


def _put_resolution(draft: Draft, keys: list[str], resolutions: list[list[int]]) -> None:
    together = sorted({side for resolution in resolutions for side in resolution}) or [512]
    draft.set("data.resolution", together, "the old trainer's default")
    for key, resolution in zip(keys, resolutions, strict=True):
        why = "" if resolution == together else "one list counts for all datasets"
        old = draft.get(f"{key}.resolution")
        if not why and (old if isinstance(old, list) else [old]) != resolution:
            why = "multiples of 16, in order"
        if f"{key}.resolution" in draft.leaves:
            draft.answer(
                f"{key}.resolution", "converted" if why else "taken", f"data.resolution: {together}".strip(), why
            )
            draft.notes["data.resolution"] = f"datasets.resolution{': ' + why if why else ''}"
    if len(together) > 1:
        note = "the old trainer took every picture once per resolution"
        draft.set("data.resolution_policy", "each", note)


def _put_captions(draft: Draft, at: str, keys: list[str]) -> None:
    """The captions' settings, which count for all datasets here: of each the first that is given."""
    _put_first(draft, [f"{at}.trigger_word", *(f"{key}.trigger_word" for key in keys)], "data.captions.trigger")
    if "trigger" in draft.config["data"].get("captions", {}):
        draft.notes["data.captions.trigger"] += (
            ", put in front of captions; [trigger] in a caption file is not replaced"
        )
    _put_first(draft, [f"{key}.default_caption" for key in keys], "data.captions.default")
    dropout = [f"{key}.caption_dropout_rate" for key in keys]
    _put_first(draft, dropout, "data.captions.dropout")
    if not any(draft.get(key) is not None for key in dropout):
        draft.set("data.captions.dropout", 0.0, "the old trainer's default")
    for key in keys:
        extension = str(draft.get(f"{key}.caption_ext", "txt")).lstrip(".")
        if extension in ("txt", "caption"):
            draft.answer(f"{key}.caption_ext", "taken", "", "read beside the target")
        else:
            draft.drop(f"{key}.caption_ext", "captions are read as .txt or .caption: rename the files")


def _put_first(draft: Draft, keys: list[str], new_key: str) -> None:
    given = [key for key in keys if draft.get(key) not in (None, "")]
    of_all = f"one value counts for all datasets: that of {given[0]}" if given else ""
    for key in keys:
        is_rate = new_key.endswith("dropout")
        value = float(draft.number(key, 0.0)) if is_rate else str(draft.get(key))
        if key not in given:
            draft.answer(key, *(("no equivalent", "", of_all) if given else ("taken", "off", "off here too")))
        elif key == given[0]:
            draft.put(key, new_key, value)
        elif draft.get(key) == draft.get(given[0]):
            draft.answer(key, "taken", f"{new_key}: {value}")
        else:
            draft.answer(key, "no equivalent", "", of_all)
    several = [key for key in keys if ".datasets[" in key]
    if given and given[0] in several and not set(several) <= set(given):
        draft.notes[new_key] += "; here it counts for all datasets, also those that had none"
