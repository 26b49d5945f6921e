"""What the warm server of ranks and workers imports once. Starts no threads: a fork takes but the thread that forks."""

import gc

from configs.late_imports import import_late
from configs.library_warnings import quiet_libraries

quiet_libraries()
import_late()
gc.disable()

import data.preprocessing.run  # noqa: E402, F401
import trainer.main  # noqa: E402, F401

gc.freeze()  # the forks leave their parent's pages alone
gc.enable()
