"""A middling FLUX.1-Fill: all of FLUX.1's layers, every width an eighth, random weights; and a job that trains it.

Its transformer has 187 M parameters, its T5 89 M: about the real ones' shares of each other, so that what a step
spends on encoders has about its real share, too.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from benchmarks.preprocess import write_pictures
from configs.flux_shape import LATENT_CHANNELS
from configs.loading import load_config
from configs.schema import Config
from demo.tiny_model import build_tiny_model

ROOT = Path(__file__).resolve().parent.parent
DIVIDE = 8  # what FLUX.1's widths are divided by
PICTURES, SIDE, TEXT_LENGTH = 16, 256, 128


NAMES = ("vae", "text_encoder", "text_encoder_2", "transformer")


def published_parts(divide: int = 1, *, names: Sequence[str] = NAMES) -> dict[str, Any]:
    """FLUX.1-Fill-dev's four networks by folder, or some of them, as their published configs have them; all widths
    divided."""
    builders = {"vae": _vae, "text_encoder": _clip, "text_encoder_2": _t5, "transformer": _transformer}
    return {name: builders[name](divide) for name in names}


def _vae(divide: int) -> torch.nn.Module:
    return AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(width // divide for width in (128, 256, 512, 512)),
        layers_per_block=2,
        norm_num_groups=32 // divide,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip(divide: int) -> torch.nn.Module:
    sizes = {"hidden_size": 768 // divide, "intermediate_size": 3072 // divide, "num_hidden_layers": 12}
    return CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=12, vocab_size=49408))


def _t5(divide: int) -> torch.nn.Module:
    sizes = {"d_model": 4096 // divide, "d_ff": 10240 // divide, "num_heads": 64 // divide, "num_layers": 24}
    gated = {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False}
    return T5EncoderModel(T5Config(**sizes, **gated, d_kv=64, vocab_size=32128))


def _transformer(divide: int) -> torch.nn.Module:
    head = 128 if divide == 1 else 64  # three heads of 128 are too few to share out rows and columns
    return FluxTransformer2DModel(
        in_channels=384,
        out_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=head,
        num_attention_heads=3072 // divide // head,
        joint_attention_dim=4096 // divide,
        pooled_projection_dim=768 // divide,
        guidance_embeds=True,
        axes_dims_rope=(head // 8, head * 7 // 16, head * 7 // 16),
    )


def build_model(folder: Path) -> None:
    """The demo's model folder, its networks replaced by those of the middling model."""
    build_tiny_model(folder)
    torch.manual_seed(0)
    for part, network in published_parts(DIVIDE).items():
        shutil.rmtree(folder / part)
        network.save_pretrained(folder / part)


def build_for_training(folder: Path, config: dict) -> None:
    """The demo's model folder with a transformer of other sizes, for what does not ask for large encoders."""
    build_tiny_model(folder)
    tiny = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    FluxTransformer2DModel.from_config(tiny | config).save_pretrained(folder / "transformer")


def overrides(folder: Path, *, side: int = SIDE) -> list[str]:
    """The demo's config, all of it below `folder`, for a LoRA on one picture a step, and nothing beside steps."""
    pictures = f"{{name: photos, target: {folder}/pictures/target, mask: {folder}/pictures/mask}}"
    return [
        *(f"model.base={folder}/model", f"data.cache={folder}/cache", f"run.dir={folder}/runs"),
        *(f"data.datasets=[{pictures}]", f"data.resolution={side}", f"data.captions.text_length={TEXT_LENGTH}"),
        *("data.holdout=0", "data.shard_size_mib=4", "data.preprocess=never", "parallel.engine=single"),
        *("method={type: lora, rank: 16, alpha: 16}", "train.optimizer=adamw", "train.lr=1e-4", "train.steps=1000"),
        *("train.global_batch_size=1", "train.micro_batch_size=1", "validation.every_steps=null"),
        *("checkpoint.every_steps=null", "checkpoint.at_end=false", "logging.trackers=[]"),
    ]


def make_config(folder: Path, *more: str, side: int = SIDE) -> Config:
    return load_config(ROOT / "configs" / "demo.yaml", [*overrides(folder, side=side), *more])


def arguments(folder: Path, *more: str, side: int = SIDE) -> list[str]:
    """The trainer's command line for that config."""
    return ["--config", str(ROOT / "configs" / "demo.yaml"), *overrides(folder, side=side), *more]


def make_inputs(folder: Path, *, tiny: bool = False) -> None:
    """Pictures and a model below `folder`: the middling one, or the demo's."""
    write_pictures(folder / "pictures", PICTURES)
    (build_tiny_model if tiny else build_model)(folder / "model")
