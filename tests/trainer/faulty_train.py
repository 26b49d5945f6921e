"""The trainer with a fault: what $FAULT says, in Python, is done before it starts. For real launches, as the script of
`accelerate launch`."""

import os
import sys

from trainer.process.outcome import run_and_report
from trainer.process.stop_signals import install_stop_signals

if __name__ == "__main__":
    install_stop_signals()
    rank = int(os.environ.get("RANK", "0"))
    exec(os.environ.get("FAULT", ""))
    from trainer.main import train

    sys.exit(run_and_report(train))
