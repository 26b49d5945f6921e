"""Words that several old trainers share, in ours: base models, optimizers, precisions, resolutions, names."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain, count
from typing import Any

from configs.legacy.amount import of_epochs
from configs.legacy.draft import Draft

CountPictures = Callable[[str], int | None]
"""Pictures in a folder, by its name in the old config, "" where it has none; None if it is not on this machine."""

FILL = "black-forest-labs/FLUX.1-Fill-dev"
DEV = "black-forest-labs/FLUX.1-dev"
EXPANDED = (
    "FLUX.1-dev is expanded to Fill's inputs, which start at zero; with base " + FILL + " it fills from step 0 on"
)
_EITHER = "must be FLUX.1-Fill-dev, or FLUX.1-dev, in diffusers' layout"
TRAINS_FILL = "Here FLUX.1-Fill is trained, which sees the holed picture and the mask."
TRAINS_DEV = (
    "Here FLUX.1-dev is widened to FLUX.1-Fill's inputs, the holed picture and the mask, and learns what they mean; to "
    f"begin with a model that fills, set model.base to {FILL}."
)
TRAINS_EITHER = (
    "Here the holed picture and the mask are inputs, which FLUX.1-Fill knows, and which FLUX.1-dev is widened to and "
    "learns."
)

# Words of a file's, a folder's or a repository's name, and of the hub's owner of a repository: "swanson" is no Wan.
_OTHER_MODELS = re.compile(
    r"(?<![a-z])(schnell|kontext|flex|krea|redux|canny|depth|chroma|flux[._-]?2|sdxl|sd3|stable-?diff\w*|qwen|wan)"
    r"(?![a-z])"
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE = re.compile(r"\.(safetensors|sft|ckpt|gguf|pt|pth)$")

_OPTIMIZERS = {
    "adamw": "adamw",
    "adamw8bit": "adamw8bit",
    "adam": "adamw",
    "adam8bit": "adamw8bit",
    "pagedadamw": "adamw",
    "pagedadamw8bit": "adamw8bit",
    "pagedadamw32bit": "adamw",
    "adamw_bf16": "adamw",
    "optimi-adamw": "adamw",
    "ao-adamw8bit": "adamw8bit",
    "bnb-adamw8bit": "adamw8bit",
    "adafactor": "adafactor",
    "prodigy": "prodigy",
    "prodigyopt": "prodigy",
    "prodigy8bit": "prodigy",
}


def base_of(name: str) -> tuple[str | None, str]:
    """(model.base, why it differs from the old one) of a hub id, a folder or a file. None: the user has to say."""
    if not name:
        return None, f"the old config names no model: give {FILL}, or {DEV}, which is expanded"
    path = name.lower().replace("\\", "/").rstrip("/")
    in_hub_cache = (part for part in path.split("/") if part.startswith("models--"))
    last = next(in_hub_cache, path.rpartition("/")[2])
    word = re.sub(r"[^a-z0-9.]", "", last)
    is_file = _FILE.search(path)
    other = _OTHER_MODELS.search(path if _HUB_ID.fullmatch(path) and not is_file else last)
    if "fill" not in word and other:
        return None, f"{other[0]} is no model that fills holes: give {FILL}, or {DEV}, which is expanded"
    for hub_id, matches in ((FILL, "fill" in word), (DEV, "flux.1dev" in word or "flux1dev" in word)):
        if matches and is_file:
            why = "a single file holds the transformer alone: the hub's folder, or your copy of it, is needed"
            return hub_id, f"{why}; {EXPANDED}" if hub_id == DEV else why
        if matches:
            return name, EXPANDED if hub_id == DEV else ""
    if is_file:
        return None, f"a single file is not read: give {FILL}, or a folder in diffusers' layout"
    return name, _EITHER


def put_base(draft: Draft, key: str, name: str) -> str:
    """Set model.base from an old name, or ask for it; returns the sentence on what is trained here."""
    base, why = base_of(name)
    if base is None:
        draft.ask("model.base", why)
        draft.answer(key, "no equivalent", "", why)
    else:
        draft.put(key, "model.base", base, why)
    if why.endswith(EXPANDED):
        return TRAINS_DEV
    return TRAINS_EITHER if base is None or why == _EITHER else TRAINS_FILL


def put_optimizer(draft: Draft, key: str, old: str, lr_key: str, lr: float) -> str:
    """Set train.optimizer and train.lr; returns the optimizer."""
    optimizer = _OPTIMIZERS.get(old.lower(), "adamw8bit")
    if old.lower() not in _OPTIMIZERS:
        near = (
            "lion wants a rate 3 to 10 times lower than adamw" if "lion" in old.lower() else "its rate may be another"
        )
        draft.put(key, "train.optimizer", optimizer, f"there is no {old} here; {near}, so look at train.lr")
    else:
        draft.put(key, "train.optimizer", optimizer)
    if optimizer == "prodigy" and lr < 0.1:
        draft.put(
            lr_key, "train.lr", 1.0, "prodigy multiplies the step size that it finds by it, so it must be about 1"
        )
    else:
        draft.put(lr_key, "train.lr", float(lr))
    return optimizer


def put_interval(
    draft: Draft, in_steps: Sequence[str], in_epochs: str, new_key: str, samples: int | None, size: int
) -> None:
    """Set how often something is done, of old keys that count it in steps, one that counts it in epochs, or none.

    samples: of an epoch, None where they cannot be counted.  size: samples of an update.  0 is off; where nothing is
    said of it, or the epochs' steps are not known, it has its default here.
    """
    given = [key for key in (*in_steps, in_epochs) if draft.get(key) is not None]
    key = next((key for key in given if draft.integer(key, 0) > 0), None)
    if key is None:
        for off in given[:1]:
            draft.put(off, new_key, None, "off")
    elif key != in_epochs:
        draft.put(key, new_key, draft.integer(key, 0))
    elif samples:
        epochs = draft.integer(key, 0)
        draft.put(key, new_key, of_epochs(epochs, samples, size).steps, f"{epochs} epochs of {samples} samples")
    for other in (*in_steps, in_epochs):
        if other not in given:
            draft.answer(other, "taken", "", "null says nothing")
        elif not draft.is_answered(other) and draft.integer(other, 0) <= 0:
            draft.answer(other, "taken", "off", f"{key} counts" if key else "off here too")


def put_guidance(draft: Draft, key: str, old: float) -> None:
    """Set flow.guidance; 1 was no choice of the author's, but FLUX.1-dev's way to train without guidance."""
    if old == 1:
        why = "1 trains FLUX.1-dev as if without guidance; FLUX.1-Fill is sampled with 30, so it is trained with 30"
        draft.put(key, "flow.guidance", 30.0, why)
    else:
        draft.put(key, "flow.guidance", min(100.0, max(0.0, float(old))))


def precision_of(method: str, quantized: bool, kind: str) -> tuple[str, str]:
    """(model.precision, why) of an old word for a quantized base."""
    if not quantized:
        return "auto", "bf16 on a GPU"
    if method == "full":
        return "auto", (
            "full training changes every weight, and a quantized one cannot take a small change; if memory is short: "
            "method.type=lora, with model.precision=nf4 or int8"
        )
    word = kind.lower().partition("|")[0]  # behind it the path of an adapter that recovers accuracy
    bits = re.search(r"(?<![0-9])[1-7](?![0-9])", word.replace("e4m3", "").replace("e5m2", ""))
    if bits and int(bits[0]) <= 4:
        return "nf4", "4 bits by bitsandbytes, the one kind here"
    if "float8" in word or "fp8" in word:
        return "fp8", "8-bit floats, by torchao where the old trainer used quanto"
    return "int8", "8 bits by torchao"


def sides(values: Iterable[float]) -> list[int]:
    """Resolutions as multiples of 16 from 32 to 4096, each once, in order of size; 1024 where none is above 0."""
    return sorted({max(32, round(min(4096, value) / 16) * 16) for value in values if value > 0}) or [1024]


def run_name(text: str) -> str:
    """A text as the name of a run: letters, digits, dots, underscores and hyphens."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "imported"


def begin_job(tree: dict[str, Any], trainer: str, types: Collection[str]) -> tuple[Draft, str]:
    """A draft of a job of ai-toolkit's layout, and the key of its first process of such a type, such as
    config.process[0]: run.name, run.dir and what every imported config sets are answered."""
    types_here = [process.get("type") for process in tree["config"]["process"]]
    at = f"config.process[{next(number for number, kind in enumerate(types_here) if kind in types)}]"
    draft = Draft(tree, trainer, hide=f"{at}.")
    name = run_name(str(draft.get("config.name", "imported")))
    set_defaults(draft, name)
    draft.answer("job", "converted", "", "every run of fluxfill is one training job")
    draft.answer(f"{at}.type", "converted", "", f"read by the rules of {trainer}")
    draft.put("config.name", "run.name", name, "" if name == draft.get("config.name") else "letters, digits, . _ and -")
    draft.put(f"{at}.training_folder", "run.dir", str(draft.get(f"{at}.training_folder", "output")))
    return draft, at


def end_job(draft: Draft, tree: dict[str, Any], at: str) -> None:
    """Answer what of a job is not of the process that was translated."""
    for number in range(len(tree["config"]["process"])):
        other = f"config.process[{number}]"
        if other != at:
            why = "a process of its own: save it as a config with this process alone, and import that"
            draft.drop_known({"*": why}, f"{other}.")
    draft.drop_known({"*": "it labelled the old weights"}, "meta.")


def dataset_names(folders: Sequence[str]) -> list[str]:
    """A name for each dataset, from the last part of its folder, all different."""
    names: list[str] = []
    for folder in folders:
        last = folder.replace("\\", "/").rstrip("/").rpartition("/")[2]
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-") or "pictures"
        numbered = (f"{name}-{number}" for number in count(2))
        names.append(next(one for one in chain([name], numbered) if one not in names))
    return names


RANDOM_MASKS = {"brush": 0.6, "box": 0.2, "outpaint": 0.2}


def set_random_masks(draft: Draft, where: str) -> None:
    """Random holes for a dataset of which the old config knows no masks."""
    note = "the old run had no masks: holes are drawn. For masks of your own, give their folder here, white: repaint"
    draft.set(f"{where}.mask", {"random": dict(RANDOM_MASKS), "variants": 4}, note)


def set_defaults(draft: Draft, name: str) -> None:
    """What every imported config sets, whatever the old trainer."""
    draft.set("version", 1)
    draft.set("data.cache", f"cache/{name}", "encoded once, before training; the old caches cannot be read")
    draft.set("data.holdout", 8, "pictures that are never trained on, to watch it by; the old run kept none")
