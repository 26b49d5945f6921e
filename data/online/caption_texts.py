"""Captions' tensors, encoded when they are first asked for and kept while there is room."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.data_schema import CaptionsConfig
from data.encoders.device import HostCopy
from data.encoders.encode import NotFinite, encode_captions
from data.encoders.load import TextEncoders
from data.encoders.stored_text import store_text

_KEPT_BYTES = 512 << 20  # in the host's memory: about 128 captions of FLUX's 512 tokens in bf16


@dataclass(frozen=True)
class CaptionTensors:
    """What a shard would store of a caption, on its way to the host.  finite: whether all of it is."""

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
    """Caption -> its tensors. For one thread.

    A caption goes through the encoders alone, not in a batch: so its tensors never hang on what else was asked for, and
    a resumed run has the same. 512 tokens keep a GPU busy by themselves.
    """

    def __init__(self, encoders: TextEncoders, captions: CaptionsConfig) -> None:
        self._encoders, self._captions = encoders, captions
        self._kept: OrderedDict[str, CaptionTensors] = OrderedDict()

    def get(self, caption: str) -> CaptionTensors:
        """Does not wait for the device."""
        if caption in self._kept:
            self._kept.move_to_end(caption)
            return self._kept[caption]
        text = encode_captions(self._encoders, [caption], text_length=self._captions.text_length)
        stored = store_text(text.t5[0], text.pooled[0], self._captions.text_dtype)
        finite = torch.isfinite(text.t5).all() & torch.isfinite(text.pooled).all().to(text.t5.device)
        found = CaptionTensors(caption, {name: HostCopy(tensor) for name, tensor in stored.items()}, HostCopy(finite))
        self._kept[caption] = found
        if len(self._kept) > max(1, _KEPT_BYTES // sum(tensor.nbytes for tensor in stored.values())):
            self._kept.popitem(last=False)
        return found
