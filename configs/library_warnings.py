"""Import-time chatter of libraries, kept off a user's screen.

Only named loggers, and only below an error: what torchao and bitsandbytes say of kernels that are not there, torch of
enums, diffusers of torchao and of a LoRA that holds nothing for the text encoders, transformers of a torchvision that
FLUX does not use.
"""

import logging
import os
import sys
import warnings

_CHATTERING = (
    "bitsandbytes.autograd._functions",
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "diffusers.loaders.lora_base",
    "bitsandbytes.backends.cpu.ops",
    "transformers.utils.import_utils",
    "transformers.models.auto.image_processing_auto",
)


# What DeepSpeed, accelerate and FSDP still call, or say of their own doing: nothing that a user could mend.
_DEPRECATED_IN_LIBRARIES = (
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    r"Slicing a flattened dim from root mesh will be deprecated",
    r"FSDP2-wrapped module \(FSDPFlux\w+\) returned a view tensor",
    r"TypedStorage is deprecated",
)


# DeepSpeed sets its logger's level itself when it is imported; transformers imports it to save a text encoder.
_DEEPSPEED_FOUND_NO_GPU = "Setting accelerator to CPU"


def quiet_libraries() -> None:
    """Call it before torch, diffusers or transformers are imported."""
    for name in _CHATTERING:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_no_chatter)
    for message in _DEPRECATED_IN_LIBRARIES:
        warnings.filterwarnings("ignore", message=message)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # their bars, in a log file, are a line per tick


def _is_no_chatter(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_DEEPSPEED_FOUND_NO_GPU)
