"""The datasets of an sd-scripts run: [[datasets]] and their subsets, or a folder of repeat folders, as 10_sofa."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.legacy.draft import Draft, show
from configs.legacy.words import CountPictures, dataset_names, set_random_masks, sides

_REPEATS = re.compile(r"(\d+)(?:_(.*))?")
_MIGRATE = "`fluxfill migrate` looks at the pixels and"


@dataclass(frozen=True)
class _Subset:
    """A folder of pictures.  places: beginnings of the old keys that its settings may stand at, the nearest first.
    folder_key: the old key of its folder.  pictures: None where they cannot be counted.  class_name: its caption of
    pictures without one."""

    places: tuple[str, ...]
    folder_key: str
    folder: str
    repeats: int
    pictures: int | None
    class_name: str

    @property
    def samples(self) -> int | None:
        return None if self.pictures is None else self.pictures * self.repeats

    def key(self, draft: Draft, name: str) -> str:
        """Where a setting of the subset stands."""
        keys = [f"{place}{name}" for place in self.places]
        return next((key for key in keys if draft.get(key) is not None), name)


def put_datasets(draft: Draft, count_pictures: CountPictures) -> tuple[int | None, int]:
    """Translate the datasets; (samples of an epoch or None, batch size of the first)."""
    subsets = _subsets(draft, count_pictures)
    names = dataset_names([subset.folder or "pictures" for subset in subsets])
    counted = [subset.samples for subset in subsets]
    for place, (subset, name) in enumerate(zip(subsets, names, strict=True)):
        where = f"data.datasets.{place}"
        draft.set(f"{where}.name", name)
        if not subset.folder:
            what = "the folder of the pictures; the old config names none"
            if not draft.has("datasets"):
                what = "the folder of the pictures: the dataset file was not found, --data FILE names it"
            draft.ask(f"{where}.target", what)
        elif subset.folder_key == "train_data_dir":
            draft.set(f"{where}.target", subset.folder, "train_data_dir")
        else:
            draft.put(subset.folder_key, f"{where}.target", subset.folder)
        _put_mask(draft, subset, where)
        if draft.flag(subset.key(draft, "flip_aug")):
            draft.set(f"{where}.flip", True, "flip_aug")
        if len(subsets) > 1:
            is_known = None not in counted and bool(subset.samples)
            weight = float((subset.samples or 0) if is_known else subset.repeats)
            note = "the share in the mix: pictures x num_repeats"
            note += "" if None not in counted else f". Put the number of pictures x {subset.repeats} here"
            draft.set(f"{where}.weight", weight, note)
    _answer_folder(draft, subsets)
    together = sides([_side(draft, subset.key(draft, "resolution")) for subset in subsets])
    draft.set("data.resolution", together, draft.name("resolution"))
    if len(together) > 1:
        draft.set(
            "data.resolution_policy", "each", "the datasets had different ones; here each picture is taken at each"
        )
    _put_captions(draft, subsets)
    _answer_datasets(draft, together)
    batch = subsets[0].key(draft, "batch_size")
    size = draft.integer(batch if batch in draft.leaves else "train_batch_size", 1)
    samples = None if None in counted else sum(count for count in counted if count)
    return samples or None, size


def _subsets(draft: Draft, count_pictures: CountPictures) -> list[_Subset]:
    """The folders that are trained on; one without a name, if the old config names none."""
    found = []
    for outer in range(draft.count("datasets")):
        for inner in range(draft.count(f"datasets[{outer}].subsets")):
            at = f"datasets[{outer}].subsets[{inner}]"
            places = (f"{at}.", f"datasets[{outer}].", "general.")
            folder = str(draft.get(f"{at}.image_dir", ""))
            key = next((f"{place}num_repeats" for place in places if draft.has(f"{place}num_repeats")), "num_repeats")
            pictures = count_pictures(folder) if folder else None
            class_name = str(draft.get(f"{at}.class_tokens", ""))
            found.append(_Subset(places, f"{at}.image_dir", folder, draft.integer(key, 1), pictures, class_name))
    if found:
        return found
    parent = str(draft.get("train_data_dir", ""))
    for folder, repeats, class_name in _repeat_folders(Path(parent)) if parent else []:
        found.append(_Subset((), "train_data_dir", folder, repeats, count_pictures(folder), class_name))
    return found or [_Subset((), "train_data_dir", parent, 1, count_pictures(parent), "")]


def _repeat_folders(parent: Path) -> list[tuple[str, int, str]]:
    """(folder, repeats, class) of each 10_class in a folder, of which the old trainer read no other; none where it is
    not on this machine."""
    try:
        names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    except OSError:
        return []
    matches = [(name, _REPEATS.fullmatch(name)) for name in names]
    return [(str(parent / name), int(found[1]), found[2] or "") for name, found in matches if found and int(found[1])]


def _answer_folder(draft: Draft, subsets: list[_Subset]) -> None:
    first = subsets[0]
    if first.folder_key != "train_data_dir":
        draft.answer("train_data_dir", "ignored by the old trainer too", "", "the datasets count before it")
    elif not first.folder:
        draft.drop("train_data_dir", "no folder")
    elif first.folder != draft.get("train_data_dir"):
        why = "each of its repeat folders, as 10_sofa, is a dataset, with the repeats in its weight"
        draft.answer("train_data_dir", "converted", "data.datasets", why)
    else:
        why = (
            "there is no repeat folder, as 10_sofa, to be seen here, so each picture counts once: give --pictures as "
            "pictures x repeats; `fluxfill migrate` reads such folders"
        )
        draft.answer("train_data_dir", "converted", f"data.datasets.0.target: {first.folder}", why)
        draft.notes["data.datasets.0.target"] = f"train_data_dir: {why}"


def _put_mask(draft: Draft, subset: _Subset, where: str) -> None:
    key = f"{subset.places[0]}conditioning_data_dir" if subset.places else ""
    folder = draft.get(key)
    if isinstance(folder, str) and folder:
        draft.put(key, f"{where}.mask", folder, "white is the hole; the old trainer weighed the loss by it")
    elif draft.flag(subset.key(draft, "alpha_mask")):
        draft.ask(f"{where}.mask", f"the folder of the masks: {_MIGRATE} makes them from transparent pictures")
    elif draft.get("conditioning_data_dir"):
        draft.ask(f"{where}.mask", "the folder of the masks, white: repaint; the old config has one folder for all")
    else:
        set_random_masks(draft, where)


def _put_captions(draft: Draft, subsets: list[_Subset]) -> None:
    """The captions' settings, which count for all datasets here: of each the first that is given."""
    classes = [subset.class_name for subset in subsets if subset.class_name]
    if classes:
        note = "the class: the caption of pictures without one"
        note += ", of all datasets: the first counts" if len({subset.class_name for subset in subsets}) > 1 else ""
        draft.set("data.captions.default", classes[0], note)
    rates = [float(draft.number(subset.key(draft, "caption_dropout_rate"), 0.0)) for subset in subsets]
    is_given = draft.get(subsets[0].key(draft, "caption_dropout_rate")) is not None
    note = "caption_dropout_rate" if is_given else "the old trainer's default"
    if len(set(rates)) > 1:
        was = ", ".join(f"{rate:g}" for rate in rates)
        note += f": one counts for all datasets, that of the first; they had {was}"
        draft.really_did.append(f"It left out captions of its datasets at different rates, {was}; here one counts.")
    draft.set("data.captions.dropout", rates[0], note)


def _side(draft: Draft, key: str) -> float:
    """A resolution, which may be a number, a pair, or text as "512,768", as the side of a square of that area."""
    value = draft.get(key) or 512
    pair = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    try:
        width, height = float(pair[0]), float(pair[-1])
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"{draft.name(key)} is {show(value)}, but must be a number of pixels, or two. Correct it there, and import "
            "it again."
        ) from error
    return float(abs(width * height) ** 0.5)


def _answer_datasets(draft: Draft, resolution: list[int]) -> None:
    """Say of the datasets' keys, which may stand on any of three levels, what became of them."""
    captions: dict[str, Any] = draft.config["data"]["captions"]
    dropout = captions["dropout"]
    answers = {
        "resolution": ("converted", f"data.resolution: {resolution}", "the side of a square of that area"),
        "num_repeats": ("converted", "data.datasets.*.weight", "a share in the mix, of several datasets"),
        "batch_size": ("converted", "train.global_batch_size", "one batch size counts for all datasets"),
        "flip_aug": ("taken", "data.datasets.*.flip", ""),
        "class_tokens": (
            "converted",
            f"data.captions.default: {captions.get('default', '')}",
            "the first counts for all",
        ),
    }
    for key in draft.open_keys():
        name = key.rpartition(".")[2]
        if name in ("caption_extension", "caption_ext"):
            is_read = str(draft.get(key) or "txt").lstrip(".") in ("txt", "caption")
            if is_read:
                draft.answer(key, "taken", "", "read beside the target")
            else:
                draft.answer(key, "no equivalent", "", "captions are read as .txt or .caption: rename the files")
        elif name == "caption_dropout_rate":
            if draft.number(key, 0.0) == dropout:
                draft.answer(key, "taken", f"data.captions.dropout: {dropout:g}")
            else:
                why = f"one rate counts for all datasets, that of the first: {dropout:g}"
                draft.answer(key, "no equivalent", "", why)
        elif name in answers:
            verdict, new, why = answers[name]
            draft.answer(key, verdict, new, why)  # type: ignore[arg-type]
        elif name in ("cache_latents", "cache_latents_to_disk"):
            draft.drop_always(key, "data.mode: cached: pictures and captions are encoded once, to disk")
