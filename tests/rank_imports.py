"""What the warm server of ranks imports once. What `data` imports late, for the sake of the command
line, is fetched too. Starts no threads: a fork takes only the thread that forks."""

from data.library_noise import quiet_libraries

quiet_libraries()

import trainer.main  # noqa: E402, F401
