"""The training process: command line, run owner, outcome, stop signals, launcher, failed ranks. Nothing heavy: in force
before torch."""
