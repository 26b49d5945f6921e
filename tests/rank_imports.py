"""What the warm server of ranks and workers imports once. Starts no threads: a fork takes but the thread that forks."""

from configs.library_warnings import quiet_libraries

quiet_libraries()

import data.preprocessing.run  # noqa: E402, F401
import trainer.main  # noqa: E402, F401
