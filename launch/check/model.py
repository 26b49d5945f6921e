"""The model's folder: its parts, the sizes that their configs say, and the files of their weights."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

from configs.errors import InputError
from configs.fit import named_fit
from configs.flux_shape import DEV_CHANNELS, FILL_CHANNELS, LATENT_CHANNELS, FluxShape, trained_parameters
from configs.memory import TEXT_PARAMETERS, VAE_PARAMETERS, VAE_WIDTH
from configs.schema import Config
from data.encoders.model_folder import find_model, is_hub_id, read_part_config, read_part_number
from launch.check.result import Check, error_of, ok

_WEIGHTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
# Of each tokenizer one of these sets of files.
_TOKENIZERS = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
}
_AGAIN = "Fetch the model again."


@dataclass(frozen=True)
class Sizes:
    """What a model's memory is reckoned by: the transformer's shape, the parameters of the VAE and of both text
    encoders, and the VAE's first block_out_channels, which scale what a picture takes in it."""

    shape: FluxShape
    vae: int = VAE_PARAMETERS
    text: int = TEXT_PARAMETERS
    vae_width: int = VAE_WIDTH


class Model(NamedTuple):
    """A model that is here."""

    folder: Path
    sizes: Sizes


def published_sizes(base: str) -> Sizes | None:
    """Those of FLUX.1-Fill-dev or FLUX.1-dev, by the name alone; None for other names."""
    name = base.rpartition("/")[2].lower()
    channels = {"flux.1-fill-dev": FILL_CHANNELS, "flux.1-dev": DEV_CHANNELS}.get(name)
    return None if channels is None else Sizes(FluxShape(in_channels=channels))


def find_local_model(base: str) -> tuple[Path | None, Check]:
    """The folder of model.base, if it is on this machine; nothing is fetched."""
    try:
        folder = find_model(base, download=False)
    except InputError as error:
        return None, _missing(base) if is_hub_id(base) else error_of("model", error)
    return folder, ok("model", f"{base} is in {folder}" if str(folder) != base else f"{folder} has all its parts")


def _missing(base: str) -> Check:
    """A hub model of which there is no whole copy: nothing fetches it offline, nor a gated one without a token."""
    from huggingface_hub import constants, get_token

    what = f"{base} is not on this machine, or not all of it"
    fetch = f"fluxfill fetch {base}"
    if constants.HF_HUB_OFFLINE:
        cure = f"Run `{fetch}` where there is a network with the same HF_HOME, or point model.base at a copy's folder."
        return Check("model", "error", f"{what}, and HF_HUB_OFFLINE is set", cure)
    if get_token() is None:
        cure = (
            f"If it is gated, as FLUX.1-Fill-dev is, accept its licence on {constants.ENDPOINT}/{base} and log in with "
            f"`hf auth login`; then `{fetch}`."
        )
        return Check("model", "error", f"{what}, and nobody is logged in to the hub", cure)
    licence = f"accept its licence on {constants.ENDPOINT}/{base}"
    return Check("model", "error", what, f"Run `{fetch}` before GPUs wait for it; if it is refused, {licence}.")


def check_model(folder: Path) -> tuple[Model | None, list[Check]]:
    """The model in a folder and what is wrong with its parts; None if its transformer's sizes are not known."""
    checks: list[Check] = []
    config: dict = {}
    try:
        config = read_part_config(folder, "transformer")
        checks.append(_check_transformer(folder, config))
    except InputError as error:
        checks.append(error_of("transformer", error))
    parameters = {}
    for part, stem in _WEIGHTS.items():
        count, problems = read_weights(folder / part, stem)
        parameters[part] = count
        checks += problems
    wrong = any(check.state == "error" for check in checks)
    shape = FluxShape.of(config) if config else None
    if shape is not None and not wrong and parameters["transformer"] != shape.parameters:
        what = (
            f"{folder / 'transformer'}: its weights hold {parameters['transformer']:,} parameters, its config.json "
            f"means {shape.parameters:,}"
        )
        checks.append(Check("transformer", "error", what, f"The two do not belong together. {_AGAIN}"))
    checks += _check_encoders(folder, shape)
    checks += _check_small_files(folder)
    if shape is None:
        return None, checks
    text = parameters["text_encoder"] + parameters["text_encoder_2"]
    return Model(folder, Sizes(shape, parameters["vae"], text, _vae_width(folder))), checks


def check_method(config: Config, base: FluxShape) -> Check:
    """What the method trains on a base. Raises InputError if it names layers that there are not, or if more blocks are
    to be checkpointed than there are."""
    named_fit(config, base)
    count, method = trained_parameters(config.method, base), config.method
    kind = "every weight" if method.type == "full" else f"{method.type} of rank {method.rank}"
    return ok("method", f"{kind}: {count / 1e6:,.1f} M parameters train")


def _vae_width(folder: Path) -> int:
    try:
        return read_part_config(folder, "vae")["block_out_channels"][0]
    except (InputError, LookupError, TypeError):
        return Sizes.vae_width  # what is wrong is told by the check of the encoders


def _check_transformer(folder: Path, config: Mapping) -> Check:
    """As trainer/model/flux.py reads it."""
    channels, guided = config.get("in_channels", DEV_CHANNELS), config.get("guidance_embeds", False)
    if channels not in (FILL_CHANNELS, DEV_CHANNELS) or not guided:
        what = (
            f"{folder / 'transformer'}: {channels} input channels, {'with' if guided else 'without'} guidance, which "
            f"is neither FLUX.1-Fill-dev ({FILL_CHANNELS}) nor FLUX.1-dev ({DEV_CHANNELS}), both with guidance"
        )
        return Check("transformer", "error", what, "Point model.base at one of the two.")
    shape = FluxShape.of(config)
    kind = "FLUX.1-Fill" if channels == FILL_CHANNELS else f"FLUX.1-dev, to be expanded to {FILL_CHANNELS}"
    blocks = f"{shape.double_blocks} + {shape.single_blocks} blocks"
    return ok("transformer", f"{channels} inputs ({kind}), {blocks}, {shape.parameters / 1e6:,.1f} M parameters")


def _check_encoders(folder: Path, shape: FluxShape | None) -> Iterator[Check]:
    """Widths in which the parts must agree."""
    try:
        vae = read_part_config(folder, "vae")
        channels, shift = vae.get("latent_channels"), vae.get("shift_factor")
        if channels != LATENT_CHANNELS or shift is None:
            what = f"{folder / 'vae'}: {channels} latent channels, shift_factor {shift}; FLUX.1 has {LATENT_CHANNELS} "
            yield Check("encoders", "error", f"{what}channels and a shift", "Point model.base at a FLUX.1 model.")
        widths = {
            "text_encoder_2": ("d_model", shape and shape.text_width),
            "text_encoder": ("hidden_size", shape and shape.pooled_width),
        }
        for part, (key, expected) in widths.items():
            width = int(read_part_number(folder, part, key))
            if expected not in (None, width):
                what = f"{folder / part}: {key} is {width}, and the transformer takes {expected}"
                yield Check("encoders", "error", what, f"They are of two models. {_AGAIN}")
    except InputError as error:
        yield error_of("encoders", error)


def _check_small_files(folder: Path) -> Iterator[Check]:
    """Tokenizers and scheduler."""
    for part, sets in _TOKENIZERS.items():
        if not any(all((folder / part / name).is_file() for name in names) for names in sets):
            needed = ", or ".join(" and ".join(names) for names in sets)
            yield Check("tokenizers", "error", f"{folder / part}: no {needed}", _AGAIN)
    for part, name in (("tokenizer", "tokenizer_config.json"), ("scheduler", "scheduler_config.json")):
        try:
            read_part_config(folder, part, name)
        except InputError as error:
            yield error_of("tokenizers" if part == "tokenizer" else "scheduler", error)


def read_weights(part: Path, stem: str) -> tuple[int, list[Check]]:
    """(parameters in the files of a part's weights, what is wrong with the files).

    stem: of the files' names; the library that reads them looks for <stem>.safetensors, or an index of several.
    """
    wrong = partial(Check, "weights", "error", cure=_AGAIN)
    index = part / f"{stem}.safetensors.index.json"
    expected: dict[str, set[str]] = {}
    if index.is_file():
        try:
            for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                expected.setdefault(os.path.basename(name), set()).add(tensor)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            return 0, [wrong(what=f"{index}: no index of weights ({error})")]
    elif (part / f"{stem}.safetensors").is_file():
        expected = {f"{stem}.safetensors": set()}
    else:
        others = sorted(path.name for path in part.glob("*.bin"))
        instead = f"; of {', '.join(others)} none is read, since pickles can hold programs" if others else ""
        return 0, [wrong(what=f"{part}: no {stem}.safetensors, and no index of several{instead}")]
    count, checks = 0, []
    for name, tensors in sorted(expected.items()):
        try:
            found = read_shapes(part / name)
        except FileNotFoundError:
            checks.append(wrong(what=f"{part / name}: missing, though {index.name} names it"))
            continue
        except (OSError, ValueError) as error:
            checks.append(wrong(what=f"{part / name}: its header cannot be read, or data is cut off ({error})"))
            continue
        count += sum(prod(shape) for shape in found.values())
        if lacking := sorted(tensors - found.keys()):
            checks.append(wrong(what=f"{part / name}: lacks {lacking[0]} and {len(lacking) - 1} other tensors"))
    return count, checks


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Tensor -> shape, of a safetensors file's header. Raises ValueError if the header is none, or the file is shorter
    than it says; OSError if the file cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
