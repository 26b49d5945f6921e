"""Import-time chatter of libraries, kept off a user's screen.

Only named loggers, and only below an error: what torchao says of kernels for cards that are not there, torch of enums,
diffusers of torchao, transformers of a torchvision that FLUX does not use.
"""

import logging
import os
import sys

_CHATTERING = (
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "transformers.utils.import_utils",
    "transformers.models.auto.image_processing_auto",
)


def quiet_libraries() -> None:
    """Call it before torch, diffusers or transformers are imported."""
    for name in _CHATTERING:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # their bars, in a log file, are a line per tick
