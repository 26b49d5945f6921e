"""The training process: command line, outcome, stop signals, failed ranks. Nothing heavy: in force before torch."""
