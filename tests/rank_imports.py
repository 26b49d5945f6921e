"""What the warm server of ranks and workers imports once. Starts no threads: a fork takes but the thread that forks."""

from data.library_noise import quiet_libraries

quiet_libraries()

import data.preprocess  # noqa: E402, F401
import trainer.main  # noqa: E402, F401
