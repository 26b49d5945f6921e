"""Samples through the encoders, batch by batch, beside whatever else their devices do."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.data_schema import CaptionsConfig
from data.encoders.device import HostCopy, no_memory
from data.encoders.encode import NotFinite, collate_pixels, encode_pixels
from data.encoders.load import Encoders
from data.online.caption_texts import CaptionTensors, CaptionTexts
from data.online.encoder_turns import EncoderTurns
from data.samples.geometry import Pixels
from data.samples.plan import PlannedSample


@dataclass(frozen=True)
class EncodedBatch:
    """A batch on its way to the host.

    latents, masked_latents: bf16 [B, 16, h, w].  finite: bool [B], whether both are.  masks: uint8 [H, W/8] of each,
    bit-packed rows.  texts: of each; None where none was asked for.
    """

    samples: Sequence[PlannedSample]
    latents: HostCopy
    masked_latents: HostCopy
    finite: HostCopy
    masks: Sequence[np.ndarray]
    texts: Sequence[CaptionTensors | None]

    def wait(self) -> list[dict[str, Tensor]]:
        """What a shard would store of each sample, by name, once it is there. Raises NotFinite if an encoder failed."""
        latents, masked_latents = self.latents.wait(), self.masked_latents.wait()
        for sample, finite in zip(self.samples, self.finite.wait().tolist(), strict=True):
            if not finite:
                raise NotFinite(
                    f"the latents of {sample.triple.target} hold NaN or infinity. Look at the model's files, at the "
                    "GPU, and at this sample's pictures."
                )
        return [
            {
                "latents": latents[row],
                "masked_latents": masked_latents[row],
                "mask": torch.from_numpy(self.masks[row]),
                **(text.wait() if text is not None else {}),
            }
            for row, text in enumerate(self.texts)
        ]


class BatchEncoder:
    """Encodes on streams of its own: on a GPU that trains too, the two take turns instead of waiting for each other.

    For one thread at a time. Others may use the same encoders in between, by `turns`.
    """

    def __init__(self, encoders: Encoders, captions: CaptionsConfig) -> None:
        self._vae = encoders.vae
        self._texts = CaptionTexts(encoders.text, captions)
        parts = (encoders.vae, encoders.text.clip, encoders.text.t5)
        devices = {part.device for part in parts if part.device.type == "cuda"}
        for device in devices:
            torch.cuda.synchronize(device)  # the weights were put there on another stream
        self.turns = EncoderTurns(devices)

    def own_thread(self) -> None:
        """For a thread that does nothing else: its GPU is the VAE's. Else each would open the first GPU too."""
        if self._vae.device.type == "cuda":
            torch.cuda.set_device(self._vae.device)

    def encode(
        self, samples: Sequence[PlannedSample], pixels: Sequence[Pixels], *, with_text: Sequence[bool]
    ) -> EncodedBatch:
        """Queue a batch of one bucket, without waiting for the device.

        with_text: whether a sample's caption is wanted.  Raises InputError if the device has no memory for it.
        """
        try:
            batch = collate_pixels([[each] for each in pixels], device=self._vae.device)
            with self.turns.first():
                encoded = encode_pixels(self._vae, batch)
                latents, masked_latents = encoded.latents, encoded.masked_latents[0]
                return EncodedBatch(
                    samples,
                    HostCopy(latents.bfloat16().contiguous()),  # convolutions may leave the channels last
                    HostCopy(masked_latents.bfloat16().contiguous()),
                    HostCopy((torch.isfinite(latents) & torch.isfinite(masked_latents)).flatten(1).all(dim=1)),
                    [np.packbits(each.mask, axis=1) for each in pixels],
                    [
                        self._texts.get(sample.triple.caption) if wanted else None
                        for sample, wanted in zip(samples, with_text, strict=True)
                    ],
                )
        except torch.OutOfMemoryError as error:
            raise no_memory(self._vae.device, f"encode {len(samples)} pictures at once", error) from error
