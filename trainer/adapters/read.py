"""Adapter files of any trainer: LoRA, DoRA and LoKr by the names of the model's layers, alpha / rank multiplied in.

diffusers' own converters are not used but for XLabs' files.  Those of 0.42 lose alpha and prefix of the layers outside
the blocks (sd-scripts), load nothing of ComfyUI's `lora_A`, refuse peft's own folders, drop `dora_scale`, and know the
fused layers of the single blocks in FLUX.1's width alone; tests/trainer/adapters/test_read.py holds each.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from diffusers import FluxFillPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.adapter_targets import MODEL
from configs.errors import InputError
from data.storage.checkpoint_folders import complete_checkpoints
from trainer.adapters.files import INPUT_LAYER, WEIGHTS_NAME
from trainer.adapters.layer_names import LayerPart, flat_name, is_of_text_encoder, parts_by_name
from trainer.model.flux import DEV_CHANNELS, FILL_CHANNELS

Kind = Literal["lora", "dora", "lokr"]

_PEFT_WEIGHTS, _PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"

# What follows a layer's name -> the tensor's name here.
_ROLES = {
    "lora_A": r"lora_A(?:\.default)?\.weight|lora_down\.weight|lora\.down\.weight",
    "lora_B": r"lora_B(?:\.default)?\.weight|lora_up\.weight|lora\.up\.weight",
    "magnitude": r"lora_magnitude_vector(?:\.default)?(?:\.weight)?|dora_scale",
    "alpha": "alpha",
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
}
_TENSOR_NAME = re.compile(r"(.+?)\.(?:" + "|".join(f"(?P<{role}>{name})" for role, name in _ROLES.items()) + ")")
_PEFT_PREFIX = re.compile(r"(base_model\.model\.)?(transformer\.|diffusion_model\.)?")  # that patterns go without
_WIDTH = re.compile(r"(.*)\.reshape_weight")  # tells ComfyUI that the adapter widens the layer, and to what

Factors = dict[str, Tensor]  # "lora_A", "lora_B", "magnitude", or "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"


class Alpha(NamedTuple):
    """A layer's scale, alpha / rank (rank: its square root under rsLoRA)."""

    alpha: float
    rank: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class SavedAdapter(NamedTuple):
    """An adapter as its file holds it.

    layers: the model's layers that it adapts -> their factors in fp32, the scale multiplied into lora_B or lokr_w1.
    alphas: of the same layers.  names_alpha: False: nothing tells of an alpha, so the scale is 1.  widens_input: it
    says that it was made on FLUX.1-dev, expanded; False: it says nothing of it.  text_layers: how many layers of text
    encoders it adapts.  problems: why it cannot be used as it is; then layers may lack some.
    """

    kind: Kind
    layers: dict[str, Factors]
    alphas: dict[str, Alpha]
    names_alpha: bool
    widens_input: bool
    text_layers: int
    problems: list[str]


def find_adapter_file(source: Path) -> Path:
    """The safetensors file that is, or lies in, `source`. Raises InputError if there is none, or more than one."""
    run_or_checkpoint = source.parent if re.fullmatch(r"rank-\d+\.safetensors", source.name) else source
    if (run_or_checkpoint / "state.json").is_file() or (source / "checkpoints").is_dir():
        raise InputError(f"method.init_from {source}: {_name_adapters(run_or_checkpoint)}")
    if source.suffix == ".safetensors" and source.is_file():
        return source
    if not source.is_dir():
        what = "is no .safetensors file" if source.exists() else "no such file or folder"
        raise InputError(f"method.init_from {source}: {what}. Give a LoRA, DoRA or LoKr as .safetensors.")
    if (source / WEIGHTS_NAME).is_file():
        return source / WEIGHTS_NAME
    files = sorted(source.glob("*.safetensors"))
    if len(files) != 1:
        raise InputError(
            f"method.init_from {source}: holds {len(files)} .safetensors files and no {WEIGHTS_NAME}. Name the file."
        )
    return files[0]


def _name_adapters(folder: Path) -> str:
    """Where the adapters of a run's or a checkpoint's folder lie."""
    newest = [checkpoint / "adapter" for checkpoint in complete_checkpoints(folder)[-1:]]
    found = [folder / "adapter", *sorted(folder.glob("final*")), *newest]
    places = [str(path) for path in found if (path / WEIGHTS_NAME).is_file()]
    kind = "a checkpoint" if (folder / "state.json").is_file() else "a run's folder"
    if not places:
        return f"is {kind} without an adapter, as of a full fine-tune: train on with its export as model.base."
    return f"is {kind}; its adapter lies in {', or '.join(places)}. Give that."


def read_adapter(file: Path, transformer: FluxTransformer2DModel) -> SavedAdapter:
    """A LoRA, DoRA or LoKr in the format of diffusers, peft, ai-toolkit, sd-scripts, ComfyUI, OneTrainer, LyCORIS or
    XLabs.

    transformer: the base, for the names and sizes of its layers; may be on the meta device.  Raises InputError if the
    file cannot be read.
    """
    tensors, metadata = _load(file)
    settings = _settings(file, metadata)
    by_name = parts_by_name(transformer)
    modules: dict[str, Factors] = {}
    texts, strange, unknown, widened = set(), [], set(), set()
    for name, tensor in tensors.items():
        matched = _TENSOR_NAME.fullmatch(name)
        if is_of_text_encoder(name):
            texts.add(matched[1] if matched else name)
        elif width := _WIDTH.fullmatch(name):
            widened |= {part.layer for part in by_name.get(flat_name(width[1]), [])}
        elif matched is None:
            strange.append(name)
        elif flat_name(matched[1]) not in by_name:
            unknown.add(matched[1])
        else:
            modules.setdefault(matched[1], {})[str(matched.lastgroup)] = tensor

    problems = []
    if strange:
        problems.append(
            f"it holds {first_names(strange)}, which no LoRA, DoRA or LoKr of linear layers has: left out, it would be "
            "another adapter"
        )
    if unknown:
        problems.append(f"it adapts {first_names(unknown)}, which this model has not: it was made for another")
    if not modules:
        problems.append("it holds no LoRA, DoRA or LoKr of FLUX.1's transformer")
    layers: dict[str, Factors] = {}
    alphas: dict[str, Alpha] = {}
    names_alpha = False
    for name, held in modules.items():
        parts = by_name[flat_name(name)]
        if problem := _defect(name, held, parts):
            problems.append(problem)
            continue
        alpha = _alpha(held, settings, name)
        names_alpha = names_alpha or alpha is not None
        alpha = alpha or Alpha(1.0, 1.0)
        factors = _scaled(held, alpha.scale)
        for part in parts:
            if _is_left_out(factors, part):
                continue
            if part.layer in layers:
                problems.append(f"it adapts {part.layer} twice, once as {name}")
            layers[part.layer] = _cut(factors, part, is_fused=len(parts) > 1)
            alphas[part.layer] = alpha
    roles = {role for factors in layers.values() for role in factors}
    kind: Kind = "lokr" if "lokr_w1" in roles else "dora" if "magnitude" in roles else "lora"
    if {"lokr_w1", "lora_A"} <= roles:
        problems.append("it is a LoKr on some layers and a LoRA on others")
        layers = {}
    widens_input = INPUT_LAYER in widened or (INPUT_LAYER in layers and _is_for_new_inputs(file, settings, metadata))
    return SavedAdapter(kind, layers, alphas, names_alpha, widens_input, len(texts), problems)


def _is_for_new_inputs(file: Path, settings: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
    """Whether a run of this trainer adapted the input layer though its `method.targets` do not name it, or peft's
    settings name it with the rank for them: its base was an expanded FLUX.1-dev. At rank 320 or more older files tell
    by the targets alone."""
    try:
        targets = json.loads(metadata.get("fluxfill.method", "{}")).get("targets")
    except (ValueError, AttributeError) as error:
        raise InputError(f"method.init_from {file}: fluxfill.method in its metadata is no JSON ({error}).") from error
    if targets is not None and not {INPUT_LAYER, f"{MODEL}{INPUT_LAYER}"} & {*targets}:
        return True
    return (settings.get("rank_pattern") or {}).get(INPUT_LAYER, 0) >= FILL_CHANNELS - DEV_CHANNELS


def _load(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file. Raises InputError if it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no dict)
            metadata = opened.metadata() or {}
        if any(".processor." in name for name in tensors):  # XLabs'
            tensors = FluxFillPipeline.lora_state_dict(tensors)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise InputError(f"method.init_from {file}: cannot be read as an adapter ({error}).") from error
    return tensors, metadata


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings that came with the factors: in the file, as diffusers writes them, or beside it; else empty.

    Raises InputError if they are no JSON.
    """
    beside = file.with_name(_PEFT_SETTINGS)
    try:
        if file.name == _PEFT_WEIGHTS and beside.is_file():
            return dict(json.loads(beside.read_text(encoding="utf-8")))
        packed = dict(json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"method.init_from {file}: the settings of peft are no JSON object ({error}).") from error
    return {key.removeprefix("transformer."): value for key, value in packed.items() if key.startswith("transformer.")}


def _alpha(held: Factors, settings: Mapping[str, Any], layer: str) -> Alpha | None:
    """A layer's alpha and rank: by its alpha tensor, else by peft's settings; None where neither is there."""
    low_rank = next((held[role] for role in ("lora_A", "lokr_w2_b", "lokr_w1_b") if role in held), None)
    if "alpha" in held and held["alpha"].item() != 0:  # sd-scripts' 0 stands for the rank
        # As in LyCORIS: two whole matrices have no scale.
        return Alpha(1.0, 1.0) if low_rank is None else Alpha(held["alpha"].item(), low_rank.shape[0])
    alpha = _of_layer(settings, layer, "alpha_pattern", settings.get("lora_alpha", settings.get("alpha")))
    if alpha is None:
        return None
    # A LoKr of peft has its scale also where both are whole, and no rank can be seen.
    rank = (
        low_rank.shape[0]
        if low_rank is not None
        else _of_layer(settings, layer, "rank_pattern", settings.get("r", alpha))
    )
    return Alpha(alpha, math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_layer(settings: Mapping[str, Any], layer: str, pattern: str, otherwise: Any) -> Any:
    values = settings.get(pattern) or {}
    own = layer[_PEFT_PREFIX.match(layer).end() :]  # type: ignore[union-attr]  # it matches ""
    named = values.get(get_pattern_key(list(values), layer), otherwise)
    return values.get(get_pattern_key(list(values), own), named)


def _defect(name: str, held: Factors, parts: list[LayerPart]) -> str | None:
    """Why a layer's tensors are no adapter of it that could be cut into the model's layers; None if they are."""
    roles = {role.removesuffix("_a").removesuffix("_b") for role in held} - {"alpha"}
    for pair in (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")):
        if len(held.keys() & set(pair)) == 1:
            return f"{name} lacks one of {' and '.join(pair)}"
    if "lokr_w1" in roles or "lokr_w2" in roles:
        if roles != {"lokr_w1", "lokr_w2"}:
            return f"{name} holds {first_names(held)}, which is no whole LoKr"
        if len(parts) > 1 or parts[0].swapped:
            return f"{name} is a LoKr of {len(parts)} layers in one, which does not come apart into theirs"
        return None
    if roles - {"magnitude"} != {"lora_A", "lora_B"}:
        return f"{name} holds {first_names(held)}, but a LoRA two factors"
    a, b = held["lora_A"], held["lora_B"]
    outputs = parts[-1].rows.stop
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or b.shape[0] != outputs:
        return f"{name} has factors of {tuple(b.shape)} and {tuple(a.shape)}, made for another model"
    if "magnitude" in held and held["magnitude"].shape[0] != outputs:
        return f"{name} has magnitudes of {tuple(held['magnitude'].shape)}, not one for each of its {outputs} outputs"
    return None


def _scaled(held: Factors, scale: float) -> Factors:
    """Factors in fp32, the scale multiplied in; a small matrix of LoKr that was factored is multiplied out."""
    factors = {role: tensor.float() for role, tensor in held.items() if role != "alpha"}
    if "lokr_w1_a" in factors:
        factors["lokr_w1"] = factors.pop("lokr_w1_a") @ factors.pop("lokr_w1_b")
    scaled = "lokr_w1" if "lokr_w1" in factors else "lora_B"
    return factors | {scaled: factors[scaled] * scale}


def _is_left_out(factors: Factors, part: LayerPart) -> bool:
    """Whether a LoRA of several layers in one has only zeros for this one: it was made of adapters of the others."""
    if "lora_B" not in factors or "magnitude" in factors:
        return False
    return bool(factors["lora_B"].any()) and not factors["lora_B"][part.rows].any()


def _cut(factors: Factors, part: LayerPart, *, is_fused: bool) -> Factors:
    """One layer's part of the factors of a file's layer: the first factor is shared, the second cut by its rows."""
    if "lora_A" not in factors:
        return factors
    a, b = factors["lora_A"], factors["lora_B"][part.rows]
    if is_fused:
        # A file that was made of separate factors for q, k and v has them side by side, zeros between.
        used = b.any(dim=0)
        a, b = (a[used], b[:, used]) if used.any() else (a, b)
    cut = {"lora_A": a, "lora_B": _swapped(b) if part.swapped else b}
    if "magnitude" in factors:
        magnitude = factors["magnitude"].flatten()[part.rows]
        cut["magnitude"] = _swapped(magnitude) if part.swapped else magnitude
    return cut


def _swapped(rows: Tensor) -> Tensor:
    return rows.roll(rows.shape[0] // 2, dims=0)


def first_names(names: Collection[str]) -> str:
    """The first three of some names, and how many more."""
    first = ", ".join(sorted(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
