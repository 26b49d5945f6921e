"""The seed's own way of a step, which its users came from: VAE, CLIP and T5 on the same GPU and in every step, AdamW in
fp32, autocast, no checkpointing. By diffusers and peft alone, as its users would write it; nothing of the trainer is
called.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, FluxFillPipeline
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from configs.adapter_targets import choose_layers
from configs.flux_shape import LATENT_CHANNELS, VAE_FACTOR, FluxShape
from configs.schema import Config

_CLIP_TOKENS, _VOCABULARY = 77, 1000  # of the words that are drawn; both text encoders know more
_SHIFT, _SCALE = 0.1159, 0.3611


def encoders(shape: FluxShape, *, small: bool) -> tuple[Any, Any, Any]:
    """VAE, CLIP and T5 of FLUX.1's published sizes, or narrow ones for a CPU, with random weights."""
    by = 16 if small else 1
    vae = AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(width // by for width in (128, 256, 512, 512)),
        layers_per_block=2,
        norm_num_groups=32 // by,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    clip = {"hidden_size": shape.pooled_width, "intermediate_size": 4 * shape.pooled_width}
    layers = {"num_hidden_layers": 12 // by or 1, "num_attention_heads": 12 // by or 1}
    t5 = {"d_model": shape.text_width, "d_ff": 10240 // by, "num_heads": 64 // by, "num_layers": 24 // by or 1}
    gated = {"d_kv": 64, "feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False}
    ends = {"bos_token_id": 0, "eos_token_id": 2}
    return vae, CLIPTextModel(CLIPTextConfig(**clip, **layers, **ends)), T5EncoderModel(T5Config(**t5, **gated))


class SeedTrainer:
    """Every model on one device.  tokens: of a sample, text included."""

    def __init__(self, transformer: Any, config: Config, device: torch.device, *, side: int, small: bool) -> None:
        assert config.method.type == "lora"
        shape = FluxShape.of(transformer.config)
        with device:
            self._vae, self._clip, self._t5 = encoders(shape, small=small)
        self._clip, self._t5 = self._clip.bfloat16().eval(), self._t5.bfloat16().eval()
        self._transformer, self._device, self._side = transformer.requires_grad_(False), device, side
        linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
        targets = choose_layers(linear, config.method)
        transformer.add_adapter(
            LoraConfig(r=config.method.rank, lora_alpha=config.method.alpha, target_modules=targets)
        )
        self._trained = [weight for weight in transformer.parameters() if weight.requires_grad]
        for weight in self._trained:
            weight.data = weight.data.float()
        self._optimizer = torch.optim.AdamW(self._trained, lr=config.train.lr)
        self._text = config.data.captions.text_length
        self.tokens = (side // (2 * VAE_FACTOR)) ** 2 + self._text
        transformer.train()

    def backward(self) -> Tensor:
        """Encode one picture, its mask and its caption, and add its gradient; returns the loss."""
        h = w = self._side // VAE_FACTOR
        picture = torch.rand(1, 3, self._side, self._side).to(self._device) * 2 - 1
        hole = torch.zeros(1, 1, self._side, self._side, device=self._device)
        hole[:, :, self._side // 4 : self._side // 2] = 1
        words = torch.randint(3, _VOCABULARY, (1, self._text), device=self._device)
        with torch.no_grad():
            latents, masked = (
                (self._vae.encode(pixels).latent_dist.sample() - _SHIFT) * _SCALE
                for pixels in (picture, picture * (1 - hole))
            )
            pooled = self._clip(words[:, :_CLIP_TOKENS]).pooler_output
            t5 = self._t5(words).last_hidden_state
        noise, sigma = torch.randn_like(latents), torch.sigmoid(torch.randn(1, device=self._device))
        pack = FluxFillPipeline._pack_latents
        pixels = hole[:, 0].view(1, h, VAE_FACTOR, w, VAE_FACTOR).permute(0, 2, 4, 1, 3).reshape(1, VAE_FACTOR**2, h, w)
        mixed = (1 - sigma) * latents + sigma * noise
        packed = [pack(one, *one.shape) for one in (mixed, masked, pixels)]
        with torch.autocast(self._device.type, torch.bfloat16):
            velocity = self._transformer(
                hidden_states=torch.cat(packed, dim=-1),
                timestep=sigma,
                guidance=torch.full((1,), 30.0, device=self._device),
                pooled_projections=pooled,
                encoder_hidden_states=t5,
                txt_ids=torch.zeros(self._text, 3, device=self._device),
                img_ids=FluxFillPipeline._prepare_latent_image_ids(1, h // 2, w // 2, self._device, torch.float32),
                return_dict=False,
            )[0]
        target = noise - latents
        loss = torch.nn.functional.mse_loss(velocity.float(), pack(target, *target.shape))
        loss.backward()
        return loss.detach()

    def step(self) -> float:
        """The last sample of an update, and the update."""
        loss = self.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()
