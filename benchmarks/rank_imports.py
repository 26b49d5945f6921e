"""What the warm server of ranks and workers imports once. Starts no threads: a fork takes but the thread that forks."""

import gc
import os

STARTED_WITH = frozenset(os.environ)  # variables: what imports set stands beside them

from configs.library_warnings import quiet_libraries  # noqa: E402
from configs.lighter_imports import lighten_imports  # noqa: E402

quiet_libraries()
lighten_imports()
gc.disable()

import torch  # noqa: E402

import benchmarks.before_after  # noqa: E402, F401
import data.preprocessing.run  # noqa: E402, F401
import trainer.export.verify  # noqa: E402  (with peft and the pipeline)
import trainer.main  # noqa: E402, F401

torch.compile(lambda: None)  # imports its compiler, as a module of DeepSpeed's does in every rank
gc.freeze()  # the forks leave their parent's pages alone
gc.enable()
