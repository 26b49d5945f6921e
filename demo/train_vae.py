"""Train the demo's VAE on the demo's photographs and store it in demo/vae (fp16, under 4 MB).

    python -m demo.train_vae

Takes about 12 minutes on two cores. Its result is committed: run it again only to change the VAE. It prints the PSNR of
the round trip over the demo's 96 crops, which is the ceiling of what any fill can reach there.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional

from configs.flux_shape import LATENT_CHANNELS
from demo.photographs import draw_hole, load_canvases, make_triples

VAE_FOLDER = Path(__file__).parent / "vae"

SIDE = 64  # of a training crop, px
BATCH_SIZE = 8
LEARNING_RATE = 2e-3
MASKED_SHARE = 0.25  # of the training crops: the VAE must also encode pictures whose hole is grey
LATENT_PENALTY = 0.01
POSTERIOR_LOGVAR = -12.0  # standard deviation 0.0025: a sample of the posterior is its mean


def build_vae() -> AutoencoderKL:
    """The demo's AutoencoderKL, random: 1.88 M parameters, 8 x downsampling to 16 channels, like FLUX.1's."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 72, 96),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        latent_channels=LATENT_CHANNELS,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        sample_size=SIDE,
    )


def draw_batch(rng: np.random.Generator, canvases: list[np.ndarray], holes: list[np.ndarray]) -> Tensor:
    """Random crops of the photographs, half of them flipped, some with a grey hole.

    Returns [BATCH_SIZE, 3, SIDE, SIDE] in [-1, 1].
    canvases: uint8 [H, W, 3]; a photograph is drawn in proportion to its area. holes: bool [SIDE, SIDE].
    """
    areas = np.array([canvas.shape[0] * canvas.shape[1] for canvas in canvases])
    crops = []
    for index in rng.choice(len(canvases), size=BATCH_SIZE, p=areas / areas.sum()):
        top = rng.integers(canvases[index].shape[0] - SIDE + 1)
        left = rng.integers(canvases[index].shape[1] - SIDE + 1)
        crop = canvases[index][top : top + SIDE, left : left + SIDE].astype(np.float32) / 127.5 - 1
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < MASKED_SHARE:
            crop = crop * ~holes[rng.integers(len(holes))][..., None]  # 0 is mid-grey: FLUX-Fill's hole
        crops.append(crop)
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()  # [B, H, W, 3] -> [B, 3, H, W]


def train_vae(vae: AutoencoderKL, steps: int) -> None:
    """Train in place: L1 + 0.5 MSE, AdamW, a short warm-up, cosine to zero. Shows a progress bar."""
    rng = np.random.default_rng(0)
    canvases = list(load_canvases().values())
    holes = [draw_hole(rng, SIDE, SIDE) for _ in range(256)]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn())
    with Progress(TextColumn("training the VAE"), *columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("steps", total=steps, loss=math.nan)
        average_loss = 0.0
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            pictures = draw_batch(rng, canvases, holes)
            latents = vae.encode(pictures).latent_dist.mode()
            error = vae.decode(latents).sample - pictures
            loss = error.abs().mean() + 0.5 * error.square().mean()
            # One shift and one scale serve all 16 channels later: each must come out near zero mean and unit variance.
            deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
            penalty = mean.square().mean() + (deviation - 1).square().mean()
            optimizer.zero_grad()
            (loss + LATENT_PENALTY * penalty).backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            average_loss += (loss.item() - average_loss) / min(step + 1, 50)
            progress.update(bar, advance=1, loss=average_loss)


@torch.no_grad()
def settle_latents(vae: AutoencoderKL) -> None:
    """Make the posterior all but deterministic; set shift and scale: the demo's latents get mean 0 and variance 1."""
    channels = vae.config.latent_channels
    last = vae.encoder.conv_out  # its output rows: means, then log variances
    last.weight[channels:] = 0
    last.bias[channels:] = POSTERIOR_LOGVAR
    latents = torch.cat([vae.encode(picture).latent_dist.mode().flatten() for picture, _ in demo_pictures()])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def demo_pictures() -> list[tuple[Tensor, Tensor]]:
    """The demo's 96 target pictures, [1, 3, H, W] in [-1, 1], each with its mask, bool [H, W], True = hole."""
    return [
        (torch.from_numpy(triple.target.copy()).permute(2, 0, 1)[None] / 127.5 - 1, torch.from_numpy(triple.mask))
        for triple in make_triples()
    ]


def psnr(picture: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1], of any equal shapes."""
    return -10 * math.log10(functional.mse_loss(picture, reference).item())


@torch.no_grad()
def measure_round_trip(vae: AutoencoderKL) -> dict[str, float]:
    """Mean over the demo's crops of the round trip's PSNR in dB: `whole`, and `hole` (inside the holes alone)."""
    rows = []
    for picture, mask in demo_pictures():
        decoded = vae.decode(vae.encode(picture).latent_dist.mode()).sample.clamp(-1, 1) / 2 + 0.5
        reference = picture / 2 + 0.5
        rows.append((psnr(decoded, reference), psnr(decoded[:, :, mask], reference[:, :, mask])))
    whole, hole = np.mean(rows, axis=0).tolist()
    return {"whole": whole, "hole": hole}


def save_vae(vae: AutoencoderKL, folder: Path) -> None:
    """Write config.json and fp16 safetensors to folder; what was there is replaced at once, never mixed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    vae.half().save_pretrained(unfinished)
    unfinished.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def main() -> None:
    """Train, store, read back what was stored, and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=VAE_FOLDER)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    vae = build_vae()
    train_vae(vae, arguments.steps)
    settle_latents(vae)
    save_vae(vae, arguments.out)
    stored = AutoencoderKL.from_pretrained(arguments.out, torch_dtype=torch.float32)
    for name, value in measure_round_trip(stored).items():
        print(f"round trip, {name}: {value:.2f} dB")


if __name__ == "__main__":
    main()
