"""FLUX.1-Fill trained by diffusers and accelerate, as an expert would write it in a day; benchmarks/peer.py compares
with it. It imports nothing of this project.

    accelerate launch benchmarks/peer_script.py MODEL TRIPLES METRICS STEPS

All weights train in fp32 by AdamW. Captions are encoded once at start, by the pipeline; pictures are read by two
workers and go through the VAE in the loop. It saves, validates and resumes nothing.
"""

import json
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import FluxFillPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

BATCH, TEXT_LENGTH, GUIDANCE = 16, 16, 30.0


class Triples(Dataset):
    """Target, picture with the hole, mask and caption of a folder's triples, by the pipeline's own processors."""

    def __init__(self, folder: Path, pipeline: FluxFillPipeline) -> None:
        self.folder, self.names = folder, sorted(path.stem for path in (folder / "target").glob("*.png"))
        self.pictures, self.masks = pipeline.image_processor, pipeline.mask_processor

    def __len__(self) -> int:
        return len(self.names)

    def caption(self, index: int) -> str:
        return (self.folder / "target" / f"{self.names[index]}.txt").read_text(encoding="utf-8").strip()

    def __getitem__(self, index: int) -> dict:
        name = f"{self.names[index]}.png"
        target, source = (
            self.pictures.preprocess(Image.open(self.folder / role / name))[0] for role in ("target", "source")
        )
        mask = self.masks.preprocess(Image.open(self.folder / "mask" / name))[0]
        return {"target": target, "masked": source * (1 - mask), "mask": mask, "caption": self.caption(index)}


def encode(vae, pictures: Tensor) -> Tensor:
    latents = vae.encode(pictures).latent_dist.mode()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def pack(latents: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    return FluxFillPipeline._pack_latents(latents, batch, channels, height, width)


def pack_condition(masked: Tensor, mask: Tensor) -> Tensor:
    """The pipeline's prepare_mask_latents, for latents that are encoded already."""
    batch, _, height, width = mask.shape
    mask = mask[:, 0].view(batch, height // 8, 8, width // 8, 8).permute(0, 2, 4, 1, 3)
    mask = mask.reshape(batch, 64, height // 8, width // 8)
    return torch.cat([pack(masked), pack(mask)], dim=-1)


def predict(transformer, noisy: Tensor, condition: Tensor, sigma: Tensor, prompt: Tensor, pooled: Tensor) -> Tensor:
    """The velocity, packed."""
    batch, _, height, width = noisy.shape
    return transformer(
        hidden_states=torch.cat([pack(noisy), condition], dim=-1),
        timestep=sigma,
        guidance=torch.full((batch,), GUIDANCE, device=noisy.device),
        pooled_projections=pooled,
        encoder_hidden_states=prompt,
        txt_ids=torch.zeros(prompt.shape[1], 3, device=noisy.device),
        img_ids=FluxFillPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
        return_dict=False,
    )[0]


def main(model: str, triples: str, metrics: str, steps: int) -> None:
    accelerator = Accelerator()
    pipeline = FluxFillPipeline.from_pretrained(model)
    data = Triples(Path(triples), pipeline)
    with torch.no_grad():
        prompts = {
            caption: pipeline.encode_prompt(caption, caption, max_sequence_length=TEXT_LENGTH)[:2]
            for caption in {data.caption(index) for index in range(len(data))}
        }
    vae, transformer = pipeline.vae.requires_grad_(False).to(accelerator.device), pipeline.transformer.train()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3, weight_decay=0)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True)
    transformer, optimizer, loader = accelerator.prepare(transformer, optimizer, loader)
    step = 0
    with open(metrics, "a", encoding="utf-8") as file:
        while True:
            start = time.perf_counter()
            for batch in loader:
                with torch.no_grad():
                    latents, masked = encode(vae, batch["target"]), encode(vae, batch["masked"])
                prompt, pooled = (torch.cat([prompts[c][part] for c in batch["caption"]]) for part in (0, 1))
                noise = torch.randn_like(latents)
                sigma = compute_density_for_timestep_sampling("logit_normal", BATCH, 0.0, 1.0).to(latents.device)
                noisy = (1 - sigma.view(-1, 1, 1, 1)) * latents + sigma.view(-1, 1, 1, 1) * noise
                velocity = predict(transformer, noisy, pack_condition(masked, batch["mask"]), sigma, prompt, pooled)
                loss = torch.nn.functional.mse_loss(velocity, pack(noise - latents))
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(transformer.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step, now = step + 1, time.perf_counter()
                file.write(json.dumps({"step": step, "loss": loss.item(), "seconds": now - start}) + "\n")
                file.flush()
                start = now
                if step == steps:
                    return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
