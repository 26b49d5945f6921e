"""The formats of an export: who may write which, what is written, and how it is read back."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel

from configs.errors import InputError
from data.storage.safetensors_file import ReadTensor, TensorFiles, TensorSpec, write_tensor_dict, write_tensors
from trainer.adapters.files import (
    WEIGHTS_NAME,
    adapter_tensors,
    file_tensors,
    is_lokr,
    peft_settings,
    save_adapter,
    widens_input,
)
from trainer.adapters.read import read_adapter
from trainer.export.adapter_formats import kohya_tensors, peft_tensors, read_changed, weight_changes
from trainer.export.bfl import bfl_tensors, read_as_bfl, read_from_bfl
from trainer.export.comfyui_workflow import render_workflow
from trainer.export.dtypes import stored_dtype, to_stored
from trainer.export.trained import Origin, Trained, read_merged, whole_tensors
from trainer.export.verify import verify_adapter_file, verify_model, verify_tensors
from trainer.export.write import write_model

WORKFLOW = "workflow.json"

_OF_ADAPTERS = ("diffusers", "peft", "kohya", "comfyui")  # in which an adapter stays one
_OF_MODELS = ("diffusers", "comfyui", "bfl", "onefile")
FORMATS = ("diffusers", "comfyui", "bfl", "onefile", "merged", "peft", "kohya")


class Written(NamedTuple):
    """read: the whole model's tensors as the files give them back, by diffusers' names.  usage: how it is loaded, for
    the model card."""

    read: ReadTensor
    usage: str


def keeps_adapter(trained: Origin, form: str) -> bool:
    """Whether the export is an adapter, and no whole model."""
    return not trained.is_whole and form in _OF_ADAPTERS


def choose_dtype(trained: Trained, form: str, dtype: str | None) -> str:
    """The dtype asked for, else the usual one. Raises InputError for a format or dtype that the run cannot have."""
    kind = trained.config.method.type
    if trained.is_whole and form not in _OF_MODELS:
        what = "is whole already" if form == "merged" else "is for adapters"
        raise InputError(f"--format {form}: {what}; this run trained the whole model. Give {', '.join(_OF_MODELS)}.")
    if kind == "dora" and form == "kohya":
        raise InputError("--format kohya: sd-scripts has no DoRA of FLUX.1. Give merged, or comfyui or diffusers.")
    if keeps_adapter(trained, form):
        if dtype == "fp8":
            raise InputError(f"--dtype fp8 is for whole models; --format {form} of this run is an adapter. Give bf16.")
        changes = kind == "dora" and form == "comfyui"  # as large as the layers
        return dtype or ("bf16" if changes else "fp32")
    return dtype or "bf16"


def write_format(trained: Trained, out: Path, form: str, dtype: torch.dtype, metadata: Mapping[str, str]) -> Written:
    """Write the files of a format into the folder `out`, which is there, and compare them with what was trained.

    Raises RuntimeError if they are not what was written.
    """
    if keeps_adapter(trained, form):
        return _ADAPTERS[form](trained, out, dtype, metadata)
    if form in ("diffusers", "merged"):
        return _write_folder(trained, out, dtype, metadata)
    return _write_one_file(trained, out, form, dtype, metadata)


# --- adapters ---------------------------------------------------------------------------------------------------------


def _write_diffusers(trained: Trained, out: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Written:
    save_adapter(trained.live, out, tensors=trained.trained_tensors, dtype=dtype, metadata=metadata)
    verify_adapter_file(trained.live, out, trained.trained_tensors, dtype)
    return Written(_reread(trained, out / WEIGHTS_NAME), usage_in_diffusers(trained.live))


def _write_peft(trained: Trained, out: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Written:
    file = out / "adapter_model.safetensors"
    factors = adapter_tensors(trained.live, trained.trained_tensors, dtype)
    write_tensor_dict(file, peft_tensors(factors), metadata)
    settings = peft_settings(trained.live) | {"base_model_name_or_path": None, "inference_mode": True}
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (out / "adapter_config.json").write_text(text, encoding="utf-8")
    call = "pipe.transformer = PeftModel.from_pretrained(pipe.transformer, FOLDER)"
    return Written(_reread(trained, file), _in_python(f"pipe = {_pipeline(trained.live)}\n{call}"))


def _write_kohya(trained: Trained, out: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Written:
    file = out / f"{trained.config.run.name}.safetensors"
    layers = {
        layer: {role: tensor.to(dtype) for role, tensor in factors.items()}
        for layer, factors in trained.factors.items()
    }
    tensors = kohya_tensors(trained.plain, layers, widens_input=widens_input(trained.live))
    write_tensor_dict(file, tensors, metadata)
    readers = "LyCORIS" if is_lokr(trained.live) else "sd-scripts and what reads its files"
    return Written(_reread(trained, file), f"`{file.name}` is for {readers}.")


def _write_comfyui(trained: Trained, out: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Written:
    file = out / f"{trained.config.run.name}.safetensors"
    widens = widens_input(trained.live)
    base = "flux1-dev.safetensors" if widens else "flux1-fill-dev.safetensors"
    usage = _write_workflow(trained, out, whole=base, lora=file.name)
    if trained.config.method.type != "dora":
        factors = adapter_tensors(trained.live, trained.trained_tensors, dtype)
        write_tensor_dict(file, file_tensors(trained.live, factors), metadata)
        return Written(_reread(trained, file), usage)
    specs, read = weight_changes(trained.plain, trained.read_base, trained.factors, widens_input=widens, dtype=dtype)
    write_tensors(file, specs, read, metadata)
    found = TensorFiles(file)
    verify_tensors(out, found, ((name, read(name)) for name in specs))
    return Written(read_changed(trained.read_base, found.read, set(found.names())), usage)


_ADAPTERS: dict[str, Callable[[Trained, Path, torch.dtype, Mapping[str, str]], Written]] = {
    "diffusers": _write_diffusers,
    "peft": _write_peft,
    "kohya": _write_kohya,
    "comfyui": _write_comfyui,
}


def _reread(trained: Trained, file: Path) -> ReadTensor:
    """The base's tensors with an adapter's file merged in, as `method.init_from` would read it."""
    saved = read_adapter(file, trained.plain)
    if saved.problems or saved.layers.keys() != trained.factors.keys():
        raise RuntimeError(f"{file}: came back with other layers, or {saved.problems}")
    return read_merged(trained.read_base, saved.layers)


# --- whole models -----------------------------------------------------------------------------------------------------


def _write_folder(trained: Trained, out: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> Written:
    weights = whole_tensors(trained)
    write_model(trained.plain, trained.model, out, weights=weights, dtype=dtype, metadata=metadata)
    verify_model(trained.plain, out, weights=whole_tensors(trained), dtype=dtype)
    files = TensorFiles(*sorted((out / "transformer").glob("*.safetensors")))
    return Written(files.read, usage_in_diffusers(None))


def _write_one_file(trained: Trained, out: Path, form: str, dtype: torch.dtype, metadata: Mapping[str, str]) -> Written:
    file = out / f"{trained.config.run.name}.safetensors"
    shapes = trained.shapes

    def read(name: str) -> torch.Tensor:
        return to_stored(name, trained.read_whole(name), dtype)

    specs = {name: TensorSpec(stored_dtype(name, tuple(shape), dtype), tuple(shape)) for name, shape in shapes.items()}
    if form == "onefile":
        write_tensors(file, specs, read, metadata)
        found = TensorFiles(file)
        verify_tensors(out, found, ((name, read(name)) for name in specs))
        return Written(found.read, f"`{file.name}` holds the transformer alone, by diffusers' names.")
    tensors = bfl_tensors(trained.plain)
    read_bfl = read_as_bfl(read, tensors)
    fused = {
        name: TensorSpec(specs[parts[0]].dtype, (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:]))
        for name, parts in tensors.items()
    }
    write_tensors(file, fused, read_bfl, metadata)
    found = TensorFiles(file)
    verify_tensors(out, found, ((name, read_bfl(name)) for name in fused))
    usage = f"`{file.name}` holds the transformer alone, by the names of BFL's code."
    if form == "comfyui":
        usage = _write_workflow(trained, out, whole=file.name, lora=None)
    return Written(read_from_bfl(found.read, tensors, shapes), usage)


# --- how it is loaded -------------------------------------------------------------------------------------------------


def _write_workflow(trained: Trained, out: Path, *, whole: str, lora: str | None) -> str:
    nodes = render_workflow(whole=whole, lora=lora, guidance=trained.config.flow.guidance)
    (out / WORKFLOW).write_text(json.dumps(nodes, indent=2) + "\n", encoding="utf-8")
    own = f"`{lora}` goes into ComfyUI's models/loras, and {whole}" if lora else f"`{whole}`"
    return f"{own} goes into models/diffusion_models. ComfyUI opens `{WORKFLOW}` as an example."


def usage_in_diffusers(adapted: FluxTransformer2DModel | None) -> str:
    """Python that loads a folder for diffusers.  adapted: the model with the folder's adapter on it; None: the folder
    is a whole model."""
    if adapted is None:
        return _in_python("pipe = FluxFillPipeline.from_pretrained(FOLDER, torch_dtype=torch.bfloat16)")
    call = "load_lora_weights(FOLDER)"
    if is_lokr(adapted):
        call = "transformer.load_lora_adapter(FOLDER, use_safetensors=True)"
    return _in_python(f"pipe = {_pipeline(adapted)}\npipe.{call}")


def _pipeline(adapted: FluxTransformer2DModel) -> str:
    base = "FLUX.1-dev" if widens_input(adapted) else "FLUX.1-Fill-dev"
    return f'FluxFillPipeline.from_pretrained("black-forest-labs/{base}", torch_dtype=torch.bfloat16)'


def _in_python(text: str) -> str:
    return f"```python\n{text}\n```"
