"""method.init_from: an adapter of any trainer, fitted to the one of this run; the first loss is that of the old one."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from configs.adapter_targets import AdapterConfig
from configs.errors import InputError
from configs.schema import LokrConfig
from trainer.adapters.files import ADAPTER
from trainer.adapters.lokr import lokr_shapes
from trainer.adapters.read import Factors, SavedAdapter, find_adapter_file, first_names, read_adapter
from trainer.adapters.targets import name_targets

_INPUT = "x_embedder"  # wider in FLUX.1-Fill than in FLUX.1-dev
_DEV_INPUTS = 64
_NEW_INPUTS = 320
_NAMES = {"lora": "a plain LoRA", "dora": "a DoRA", "lokr": "a LoKr"}

log = logging.getLogger("fluxfill")


class Start(NamedTuple):
    """A saved adapter that fits the run's.  new: layers that it lacks, which start at zero."""

    file: Path
    saved: SavedAdapter
    new: list[str]


def read_start(
    transformer: FluxTransformer2DModel, method: AdapterConfig, ranks: Mapping[str, int], *, expanded: bool
) -> Start:
    """The adapter at `method.init_from`; its alpha need not be the config's, nor its rank if that is smaller.

    transformer: without an adapter; may be on the meta device.  ranks: of the layers that the run adapts.  expanded:
    the base was FLUX.1-dev.  Raises InputError, with all problems, if it cannot be read, or goes on differently than it
    ended.
    """
    assert method.init_from is not None
    file = find_adapter_file(method.init_from)
    saved = read_adapter(file, transformer)
    another_base = _tell_another_base(saved, ranks, expanded=expanded)
    misfits = [another_base] if another_base else _misfits(saved, transformer, method, ranks)
    problems = [*saved.problems, *misfits]
    if problems:
        raise InputError(f"method.init_from {file} does not fit:\n  " + "\n  ".join(problems))
    return Start(file, saved, [layer for layer in ranks if layer not in saved.layers])


def _tell_another_base(saved: SavedAdapter, ranks: Mapping[str, int], *, expanded: bool) -> str | None:
    """Of an adapter of Fill's inputs on expanded FLUX.1-dev, or the reverse, that it is that; the cure would be another
    than that for its rank. None where it may be of this base."""
    if not expanded and _is_of_expanded_dev(saved, ranks):
        return (
            f"it was made on FLUX.1-dev, expanded: its {_INPUT} holds the {_NEW_INPUTS} inputs that FLUX.1-Fill has of "
            "its own, and this base has them. Set model.base to that FLUX.1-dev, or method.init_from=null"
        )
    if expanded and _is_of_fills_inputs(saved):
        return (
            f"it was made on FLUX.1-Fill: its {_INPUT} adds to what Fill does with {_NEW_INPUTS} inputs that this "
            "FLUX.1-dev has not learned. Set model.base to FLUX.1-Fill-dev, or method.init_from=null"
        )
    return None


def _misfits(saved: SavedAdapter, transformer: nn.Module, method: AdapterConfig, ranks: Mapping[str, int]) -> list[str]:
    problems = []
    if surplus := saved.layers.keys() - ranks:
        targets = ", ".join(name_targets([*ranks, *surplus]))
        problems.append(f"it adapts {first_names(surplus)}, which this run does not: set method.targets=[{targets}]")
    if saved.layers and saved.kind != method.type:
        return [*problems, f"it is {_NAMES[saved.kind]}: set method.type={saved.kind}"]
    common = {layer: factors for layer, factors in saved.layers.items() if layer in ranks}
    modules = {layer: transformer.get_submodule(layer) for layer in common}
    if isinstance(method, LokrConfig):
        odd = (name for name in common if _shapes(common[name]) != lokr_shapes(modules[name], method))
        if (name := next(odd, None)) is not None:
            shapes = ", ".join(f"{part} of {shape}" for part, shape in _shapes(common[name]).items())
            problems.append(f"{name} has {shapes}: {_lokr_cure(common, modules)}")
        return problems
    if plain := [layer for layer in common if method.type == "dora" and "magnitude" not in common[layer]]:
        problems.append(f"it is a plain LoRA on {first_names(plain)}, a DoRA elsewhere")
    if alien := [name for name in common if _inputs(common[name]) not in _possible_inputs(name, modules[name])]:
        problems.append(f"it was made for another model, where {first_names(alien)} have other sizes")
    if larger := {_rank(factors) for layer, factors in common.items() if _rank(factors) > ranks[layer]}:
        problems.append(f"its rank is {', '.join(map(str, sorted(larger)))}: set method.rank={max(larger)}")
    return problems


def _is_of_expanded_dev(saved: SavedAdapter, own: Mapping[str, int]) -> bool:
    """Whether it says so, or the input layer has, alone, the rank that FLUX.1-dev needs to learn Fill's inputs, and
    that is not the run's own.  own: the run's ranks."""
    if not _has_all_inputs(saved):
        return False
    ranks = {layer: _rank(factors) for layer, factors in saved.layers.items() if "lora_A" in factors}
    wide = [layer for layer, rank in ranks.items() if rank >= _NEW_INPUTS]
    return saved.widens_input or (wide == [_INPUT] and own.get(_INPUT) != ranks[_INPUT])


def _is_of_fills_inputs(saved: SavedAdapter) -> bool:
    """Whether the input layer has all inputs, at a rank that does not suffice to learn Fill's."""
    return _has_all_inputs(saved) and not saved.widens_input and _rank(saved.layers[_INPUT]) < _NEW_INPUTS


def _has_all_inputs(saved: SavedAdapter) -> bool:
    factors = saved.layers.get(_INPUT, {})
    return "lora_A" in factors and _inputs(factors) == _DEV_INPUTS + _NEW_INPUTS


def _rank(factors: Factors) -> int:
    return factors["lora_A"].shape[0]


def _inputs(factors: Factors) -> int:
    return factors["lora_A"].shape[1]


def _possible_inputs(layer: str, module: Any) -> set[int]:
    return {module.in_features} | ({_DEV_INPUTS} if layer == _INPUT else set())


def _shapes(factors: Factors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in factors.items()}


def _lokr_cure(common: Mapping[str, Factors], modules: Mapping[str, Any]) -> str:
    """The rank and factor that make a LoKr of this file's shapes."""
    low = [factors["lokr_w2_b"].shape[0] for factors in common.values() if "lokr_w2_b" in factors]
    whole = [-(-max(factors["lokr_w2"].shape) // 2) for factors in common.values() if "lokr_w2" in factors]
    sides = sorted({factors["lokr_w1"].shape[0] for factors in common.values()} - {1})
    for rank in (max(low or whole), max(low + whole)):
        for factor in ("auto", *sides):
            made = LokrConfig.model_validate({"type": "lokr", "rank": rank, "factor": factor})
            if all(_shapes(factors) == lokr_shapes(modules[name], made) for name, factors in common.items()):
                return f"set method.rank={rank} and method.factor={factor}"
    return "no method.rank and method.factor make such a LoKr"


@torch.no_grad()
def start_from(transformer: FluxTransformer2DModel, start: Start, method: AdapterConfig) -> None:
    """Copy a saved adapter into the new one on the model, and log what of it is not as it was.

    A scale other than the file's is divided out of the second factor.  Further directions of a larger rank, and further
    inputs, start at zero.
    """
    for layer, factors in start.saved.layers.items():
        module: Any = transformer.get_submodule(layer)
        scale = module.scaling[ADAPTER]
        if start.saved.kind == "lokr":
            for name, tensor in factors.items():
                getattr(module, name)[ADAPTER].copy_(tensor / scale if name == "lokr_w1" else tensor)
            continue
        a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        rank = _rank(factors)
        a[:rank] = 0  # the further rows keep their random start, and their columns of b are 0
        a[:rank, : _inputs(factors)] = factors["lora_A"]
        b[:, :rank] = factors["lora_B"] / scale
        if "magnitude" in factors:
            module.lora_magnitude_vector[ADAPTER].weight.copy_(factors["magnitude"])
    for note in _notes(transformer, start, method):
        log.info("method.init_from: %s", note)


def _notes(transformer: FluxTransformer2DModel, start: Start, method: AdapterConfig) -> Iterable[str]:
    """What the log says of an adapter that goes on."""
    saved = start.saved
    yield f"{start.file}, {_NAMES[saved.kind]} on {len(saved.layers)} layers"
    yield _on_scale(transformer, saved, method)
    if method.type != "lokr":
        ranks = sorted({_rank(factors) for layer, factors in saved.layers.items() if layer != _INPUT})
        if any(rank < method.rank for rank in ranks):
            yield (
                f"rank {', '.join(map(str, ranks))} goes on at method.rank={method.rank}; the further directions start "
                "at zero"
            )
        if _INPUT in saved.layers and _inputs(saved.layers[_INPUT]) == _DEV_INPUTS:
            yield f"made for FLUX.1-dev's {_DEV_INPUTS} inputs; those that FLUX.1-Fill has besides start at zero"
    if start.new:
        yield f"not in it, so these start at zero: {first_names(start.new)}"
    if saved.text_layers:
        yield f"its text encoders' part is left out (layers: {saved.text_layers}); they stay as the base has them"


def _on_scale(transformer: nn.Module, saved: SavedAdapter, method: AdapterConfig) -> str:
    """alpha / rank of the file beside the run's, and what that makes of the learning rate.

    The optimizers' steps are of the size of the rate whatever the scale, so the factor that starts at zero in a new
    adapter moves the weights in proportion to the scale.
    """
    ratios = set()
    for layer, alpha in saved.alphas.items():
        module: Any = transformer.get_submodule(layer)
        ratios.add(round(module.scaling[ADAPTER] / alpha.scale, 4))
    alphas = sorted(set(saved.alphas.values()))
    told = ", ".join(f"{alpha.alpha:g} / {alpha.rank:g} = {alpha.scale:g}" for alpha in alphas[:3])
    told = f"alpha / rank is {told}{' and others' if len(alphas) > 3 else ''} in the file"
    if not saved.names_alpha:
        told = "the file names no alpha, so alpha / rank is 1 in it"
    run = f"{method.alpha:g} / {method.rank:g} = {method.alpha / method.rank:g} in this run"
    if ratios == {1.0}:
        return f"{told}, as in this run"
    faster = ", ".join(f"{ratio:.3g}" for ratio in sorted(ratios)[:3])
    return (
        f"{told}, {run}. The adapter starts as what it was, one factor divided by the difference; from there "
        f"train.lr moves the weights {faster} times as far as at the file's own scale"
    )
