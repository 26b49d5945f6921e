"""Pictures and captions through the encoders in batches, queued on CUDA streams of their own."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.data_schema import CaptionsConfig
from data.encoders.device import HostCopy, no_memory
from data.encoders.encode import NotFinite, collate_pixels, encode_captions, encode_pixels
from data.encoders.load import Encoders, TextEncoders
from data.encoders.stored_text import store_text
from data.samples.geometry import Pixels
from data.samples.plan import PlannedSample

CAPTION_CACHE_BYTES = 512 << 20  # in the host's memory: about 128 captions of FLUX's 512 tokens in bf16


@dataclass(frozen=True)
class CaptionTensors:
    """A caption's tensors as a shard stores them, on their way to the host.  finite: whether all of them are."""

    caption: str
    tensors: dict[str, HostCopy]
    finite: HostCopy

    def wait(self) -> dict[str, Tensor]:
        """`t5` [L, D] and `pooled` [P] (and `t5_scale` where texts are int8), as `store_text` makes them.

        Raises NotFinite if an encoder failed on it.
        """
        if not self.finite.wait():
            raise NotFinite(
                f"the text of {self.caption!r} holds NaN or infinity. Look at the model's files, at the GPU, and at "
                "this caption."
            )
        return {name: copy.wait() for name, copy in self.tensors.items()}


class CaptionTexts:
    """Captions' tensors, encoded at the first request, the least recently used dropped beyond CAPTION_CACHE_BYTES. For
    one thread.

    A caption goes through the encoders alone, not in a batch: so its tensors do not depend on what else was asked for,
    and a resumed run has the same. 512 tokens keep a GPU busy by themselves.
    """

    def __init__(self, encoders: TextEncoders, captions: CaptionsConfig) -> None:
        self._encoders, self._captions = encoders, captions
        self._kept: OrderedDict[str, CaptionTensors] = OrderedDict()

    def get(self, caption: str) -> CaptionTensors:
        """A caption's tensors. Does not wait for the device."""
        if caption in self._kept:
            self._kept.move_to_end(caption)
            return self._kept[caption]
        text = encode_captions(self._encoders, [caption], text_length=self._captions.text_length)
        stored = store_text(text.t5[0], text.pooled[0], self._captions.text_dtype)
        finite = torch.isfinite(text.t5).all() & torch.isfinite(text.pooled).all().to(text.t5.device)
        found = CaptionTensors(caption, {name: HostCopy(tensor) for name, tensor in stored.items()}, HostCopy(finite))
        self._kept[caption] = found
        if len(self._kept) > max(1, CAPTION_CACHE_BYTES // sum(tensor.nbytes for tensor in stored.values())):
            self._kept.popitem(last=False)
        return found


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
        """Each sample's tensors by name, as a shard would store them. Raises NotFinite if an encoder failed."""
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
    """The encoders on streams of their own: on a GPU that trains too, kernels of both interleave instead of waiting for
    each other. Threads take turns, as the libraries do not promise that their modules are safe to share."""

    def __init__(self, encoders: Encoders, captions: CaptionsConfig) -> None:
        self._vae = encoders.vae
        self._texts = CaptionTexts(encoders.text, captions)
        parts = (encoders.vae, encoders.text.clip, encoders.text.t5)
        devices = {part.device for part in parts if part.device.type == "cuda"}
        for device in devices:
            torch.cuda.synchronize(device)  # the weights were put there on another stream
        self._streams = [torch.cuda.Stream(device) for device in devices]
        self._in_use = threading.Lock()

    def own_thread(self) -> None:
        """For a thread that does nothing else: its GPU is the VAE's. Else each would open the first GPU too."""
        if self._vae.device.type == "cuda":
            torch.cuda.set_device(self._vae.device)

    @contextmanager
    def _queueing(self) -> Iterator[None]:
        with self._in_use, ExitStack() as streams:
            for stream in self._streams:
                streams.enter_context(torch.cuda.stream(stream))
            yield

    def encode(
        self, samples: Sequence[PlannedSample], pixels: Sequence[Pixels], *, with_text: Sequence[bool]
    ) -> EncodedBatch:
        """Queue a batch of one bucket, without waiting for the device.

        with_text: whether a sample's caption is wanted.  Raises InputError if the device has no memory for it.
        """
        try:
            batch = collate_pixels([[each] for each in pixels], device=self._vae.device)
            with self._queueing():
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
