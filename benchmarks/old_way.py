"""What encoding in every step adds to it, counted: operations of FLUX.1-Fill's four networks by torch's counter on the
meta device, where networks of any size take no memory, and GiB by the formulas of a plan.

    python benchmarks/old_way.py [--out benchmarks/results/old_way.jsonl]

What such a step takes in seconds on a small model: benchmarks/before_after.py.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.mid_size import ROOT, published_parts
from benchmarks.record import add_result
from configs.flux_shape import PATCH, FluxShape
from configs.loading import load_config
from configs.memory import GIB, encoding_memory, training_memory
from trainer.adapters.build import add_adapter


def on_meta(divide: int = 1) -> dict[str, torch.nn.Module]:
    with torch.device("meta"):
        return published_parts(divide)


def count_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_step(parts: dict[str, Any], *, side: int, text_length: int, checkpointing: bool = False) -> dict[str, float]:
    """10^12 operations of one picture's step with a LoRA on the transformer; plain_step: with the encoders' in each,
    over that without."""
    encoding, transformer = count_encoding(parts, side=side, text_length=text_length), parts["transformer"]
    config = load_config(ROOT / "configs" / "fill_lora.yaml")
    assert config.method.type == "lora"
    add_adapter(transformer, config.method, expanded=False, seed=0)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    training = count(lambda: step_on_meta(transformer, side // PATCH, text_length).sum().backward())
    return {
        "side": side,
        "checkpointing": checkpointing,
        **{name: round(number / 1e12, 3) for name, number in {**encoding, "transformer": training}.items()},
        "plain_step": round(1 + sum(encoding.values()) / training, 3),
    }


def count_encoding(parts: dict[str, Any], *, side: int, text_length: int) -> dict[str, int]:
    """Operations of one picture's encoding, by network."""
    vae, clip, t5 = (parts[name] for name in ("vae", "text_encoder", "text_encoder_2"))
    picture = torch.empty(1, 3, side, side, device="meta")
    tokens = torch.zeros(1, text_length, dtype=torch.long, device="meta")
    with torch.no_grad():
        return {
            "vae": 2 * count(partial(vae.encode, picture)),  # the target, and the picture with the hole
            "clip": count(partial(clip, tokens[:, :77])),
            "t5": count(partial(t5, tokens)),
        }


def count(run: Callable[[], object]) -> int:
    """Operations of matrices, convolutions and attention: two for a multiplication and its sum."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def step_on_meta(transformer: FluxTransformer2DModel, side: int, text_length: int) -> Tensor:
    """The velocity of side x side tokens."""
    empty = partial(torch.empty, device="meta")
    return transformer(
        hidden_states=empty(1, side * side, 384),
        encoder_hidden_states=empty(1, text_length, transformer.config.joint_attention_dim),
        pooled_projections=empty(1, transformer.config.pooled_projection_dim),
        timestep=empty(1),
        guidance=empty(1),
        img_ids=empty(side * side, 3),
        txt_ids=empty(text_length, 3),
    ).sample


def training_gib() -> float:
    """What the process that trains configs/fill_lora.yaml holds, with a picture of 1024 px at a time."""
    config = load_config(ROOT / "configs" / "fill_lora.yaml")
    parts = training_memory(config, FluxShape(), "single", processes=1, tokens=(1024 // PATCH) ** 2 + 512)
    return sum(part.bytes for part in parts) / GIB


def count_flux() -> dict[str, Any]:
    """FLUX.1-Fill with configs/fill_lora.yaml's LoRA: parameters, operations of a step, GiB of training and of what
    encodes in the same process."""
    parts = {name: count_parameters(part) for name, part in on_meta().items()}
    config = load_config(ROOT / "configs" / "fill_lora.yaml", ["data.encode_batch_size=1"])
    encoding = encoding_memory(
        config.data,
        text_parameters=parts["text_encoder"] + parts["text_encoder_2"],
        vae_parameters=parts["vae"],
        vae_width=128,
        pixels=1024**2,
    )
    own = {part.what: round(part.gib, 2) for part in encoding if not part.what.startswith("CUDA")}
    return {
        "benchmark": "old_way_by_count",
        "parameters": parts,
        "operations": [
            count_step(on_meta(), side=side, text_length=512, checkpointing=checkpointing)
            for side in (512, 1024)
            for checkpointing in (False, True)
        ],
        "training_gib": round(training_gib(), 1),
        "encoders_gib": round(sum(own.values()), 1),
        "encoders_gib_by_part": own,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the result to this file, as a JSON line")
    options = parser.parse_args()
    add_result(count_flux(), options.out)


if __name__ == "__main__":
    main()
