"""What an export says of itself: metadata in its files, and a model card (README.md) for people and for the hub."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from configs.loading import dump_config
from data.encoders.model_folder import is_hub_id
from trainer.export.evaluated import PAGE, render_scores
from trainer.export.formats import keeps_adapter
from trainer.export.trained import Origin
from trainer.process.starts import own_commit

MASK = "white (1) is painted anew, black (0) is kept"

PICTURE = "samples.png"

_DEV_LICENCE = "flux-1-dev-non-commercial-license"  # as the hub calls that of the two models below
_OF_DEV_LICENCE = ("black-forest-labs/FLUX.1-Fill-dev", "black-forest-labs/FLUX.1-dev")


def metadata_of(origin: Origin, form: str, dtype: str) -> dict[str, str]:
    """Facts of a run, for the metadata of the files that come of it: the same at every export."""
    config, method = origin.config, origin.config.method
    found = {
        "run": config.run.name,
        "step": str(origin.step),
        "weights": origin.weights,
        "method": json.dumps(method.model_dump(mode="json", exclude={"init_from"}), sort_keys=True),
        "base": base_name(origin),
        "base_licence": base_licence(origin),
        "base_fingerprint": origin.base_fingerprint,
        "guidance": f"{config.flow.guidance:.12g}",
        "shift": str(config.flow.shift),
        "mask": MASK,
        "config_sha256": hashlib.sha256(dump_config(config).encode()).hexdigest(),
        "format": form,
        "dtype": dtype,
        "version": _own_version(),
        "commit": own_commit(),
    }
    return {f"fluxfill.{name}": text for name, text in found.items() if text}


def base_name(origin: Origin) -> str:
    """The base's hub id, else its folder's name: where it lay says nothing to others."""
    base = origin.config.model.base
    return base if is_hub_id(base) else Path(base).expanduser().resolve().name


def base_licence(origin: Origin) -> str:
    """As the base's own card or licence file says; of BFL's models also without one."""
    card = origin.model / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, text = line.partition(":")
            if key == "license_name" or (key == "license" and text.strip() != "other"):
                return text.strip()
    if base_name(origin) in _OF_DEV_LICENCE:
        return _DEV_LICENCE
    return "see LICENSE.md of the base" if (origin.model / "LICENSE.md").is_file() else "that of the base"


def _own_version() -> str:
    try:
        return version("fluxfill")
    except PackageNotFoundError:
        return ""


def write_card(origin: Origin, out: Path, metadata: Mapping[str, str], usage: str) -> None:
    """README.md of the export, and the pictures that it shows.  usage: how the export is loaded."""
    card = render_card(origin, metadata, usage, _take_pictures(origin, out))
    (out / "README.md").write_text(card, encoding="utf-8")


def _take_pictures(origin: Origin, out: Path) -> str:
    """Copy what shows the step's fills by these weights, if there is anything: the page of an evaluation, and the
    validation's picture of held-out samples. Returns the card's section on them."""
    run, text = origin.run, ""
    if scores := render_scores(run, origin.step, origin.weights):
        text += f"## Evaluation\n\n{scores}\n"
        if (run / "evaluation" / PAGE).is_file():
            shutil.copyfile(run / "evaluation" / PAGE, out / PAGE)
            text += f"Pictures, and how certain the scores are: [{PAGE}]({PAGE}).\n\n"
    picture = run / "samples" / f"step-{origin.step:08d}-holdout.png"
    if picture.is_file() and origin.config.validation.weights == origin.weights:
        shutil.copyfile(picture, out / PICTURE)
        text += f"## Pictures\n\nHeld out of the training, filled at this step:\n\n![samples]({PICTURE})\n\n"
    return text


def render_card(origin: Origin, metadata: Mapping[str, str], usage: str, pictures: str) -> str:
    """The model card.  pictures: its section on them, or empty."""
    said = {name.removeprefix("fluxfill."): text for name, text in metadata.items()}
    relation = "adapter" if keeps_adapter(origin, said["format"]) else "finetune"
    head: dict[str, Any] = {
        "base_model": said["base"] if is_hub_id(origin.config.model.base) else None,
        "base_model_relation": relation if is_hub_id(origin.config.model.base) else None,
        "library_name": "diffusers",
        "license": "other",
        "license_name": said["base_licence"] if said["base_licence"] == _DEV_LICENCE else None,
        "pipeline_tag": "image-to-image",
        "tags": ["flux", "inpainting", "fluxfill", origin.config.method.type],
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items() if value is not None)
    rows = "\n".join(f"| {name.replace('_', ' ')} | {_cell(text)} |" for name, text in said.items())
    return (
        f"---\n{front}\n---\n# {said['run']}\n\n"
        f"An inpainting model of FLUX.1-Fill's kind, {origin.config.method.type}, trained on {said['base']} for "
        f"{said['step']} steps. The base's licence ({said['base_licence']}) goes for it too.\n\n"
        f"## Use\n\n{usage.strip()}\n\n"
        f"Mask: {said['mask']}. Guidance: {said['guidance']}, as in training.\n\n"
        f"{pictures}## Facts\n\n| | |\n| --- | --- |\n{rows}\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
