"""What a checkpoint trained: its tensors, and those of the base it goes with, read one at a time."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from configs.errors import InputError
from configs.loading import load_config
from configs.schema import Config
from data.encoders.model_folder import find_model, read_part_config
from data.storage.safetensors_file import ReadTensor, TensorFiles
from trainer.adapters.build import add_adapter
from trainer.adapters.files import INPUT_LAYER, adapter_tensors
from trainer.adapters.merge import merge
from trainer.adapters.read import Factors
from trainer.checkpoints.run_state import read_state
from trainer.checkpoints.weights import open_weights
from trainer.model.flux import DEV_CHANNELS, FILL_CHANNELS, empty_transformer


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    run: its folder.  weights: of KINDS.  model: the base's folder; base_fingerprint: of its transformer when the run
    began, "" if that was not kept.
    """

    config: Config
    run: Path
    step: int
    weights: str
    model: Path
    base_fingerprint: str

    @property
    def is_whole(self) -> bool:
        """Whether the run trains the whole model."""
        return self.config.method.type == "full"


@dataclass(frozen=True)
class Trained(Origin):
    """A checkpoint opened for export.

    live: the model that the run trains, its adapter on it, on the meta device.  plain: the same without an adapter.
    read_live, read_base: tensors of the two by parameter name.
    """

    live: FluxTransformer2DModel
    plain: FluxTransformer2DModel
    read_live: ReadTensor
    read_base: ReadTensor

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole model's tensors, in its order."""
        return {name: parameter.shape for name, parameter in self.plain.named_parameters()}

    @cached_property
    def trained_tensors(self) -> dict[str, Tensor]:
        """The adapter's parameters, by name."""
        return {name: self.read_live(name) for name, p in self.live.named_parameters() if p.requires_grad}

    @cached_property
    def factors(self) -> dict[str, Factors]:
        """The adapter by layers, fp32, of a scale of 1."""
        layers: dict[str, Factors] = {}
        for name, tensor in adapter_tensors(self.live, self.trained_tensors).items():
            layer, _, role = name.removesuffix(".weight").rpartition(".")
            layers.setdefault(layer, {})["magnitude" if role == "lora_magnitude_vector" else role] = tensor
        return layers

    def read_whole(self, name: str) -> Tensor:
        """A tensor of the whole model as trained: an adapter is merged into its base."""
        return self.read_live(name) if self.is_whole else read_merged(self.read_base, self.factors)(name)


def read_merged(read_base: ReadTensor, layers: Mapping[str, Factors]) -> ReadTensor:
    """Reader of a base's tensors with an adapter merged in."""

    def read(name: str) -> Tensor:
        layer, _, kind = name.rpartition(".")
        base = read_base(name)
        return merge(base, layers[layer]) if kind == "weight" and layer in layers else base

    return read


def open_trained(folder: Path, weights: str, *, base: str | None = None) -> Trained:
    """A checkpoint, opened.  weights: of KINDS.  base: hub id or folder; None: where the run's config says.

    Raises InputError if it holds no such weights, or its base is not the one that the run trained on.
    """
    config = load_config(folder / "config.yaml", saved_by_a_run=True)
    method, (state, _) = config.method, read_state(folder)
    model = find_model(base or config.model.base)
    live, plain = (empty_transformer(model, dtype=torch.float32) for _ in range(2))
    if method.type != "full":
        expanded = read_part_config(model, "transformer").get("in_channels", DEV_CHANNELS) == DEV_CHANNELS
        add_adapter(live, method.model_copy(update={"init_from": None}), expanded=expanded, seed=0)
    shapes = {name: parameter.shape for name, parameter in live.named_parameters() if parameter.requires_grad}
    read_trained = open_weights(folder, weights, shapes, model, is_adapter=method.type != "full")
    read_base = base_reader(model, plain)

    def read_live(name: str) -> Tensor:
        if name in shapes:
            return read_trained(name).float()
        return read_base(name.replace(".base_layer.", "."))

    began_with = state.base.fingerprint if state.base is not None else ""
    run = folder.parent.parent
    return Trained(config, run, state.step, weights, model, began_with, live, plain, read_live, read_base)


def base_reader(model: Path, plain: FluxTransformer2DModel) -> Callable[[str], Tensor]:
    """Reader of a base's tensors; FLUX.1-dev's input layer is expanded to Fill's.

    Raises InputError if its files are broken, or not those of its config.
    """
    part = model / "transformer"
    files = _open(part)
    for name, parameter in plain.named_parameters():
        shape = tuple(parameter.shape)
        narrow = (*shape[:-1], DEV_CHANNELS) if name == f"{INPUT_LAYER}.weight" else shape
        if name not in files.names() or files.shape(name) not in (shape, narrow):
            raise InputError(f"{part}: {name} is missing or of another shape. Fetch the model again.")

    def read(name: str) -> Tensor:
        tensor = files.read(name)
        if name == f"{INPUT_LAYER}.weight" and tensor.shape[1] == DEV_CHANNELS:
            tensor = torch.nn.functional.pad(tensor, (0, FILL_CHANNELS - DEV_CHANNELS))
        return tensor

    return read


def _open(part: Path) -> TensorFiles:
    try:
        return TensorFiles(*sorted(part.glob("*.safetensors")))
    except (OSError, ValueError) as error:
        raise InputError(f"{part}: cannot be read ({error}). Fetch the model again.") from error


def whole_tensors(trained: Trained) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the whole model as trained, one at a time, in the model's order."""
    return ((name, trained.read_whole(name)) for name in trained.shapes)
