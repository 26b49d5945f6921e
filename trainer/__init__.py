"""Batches -> a trained FLUX.1-Fill, room by room.

main.py        the recipe: a run from its config to its export, on one screen
method.py, training_data.py, run_log.py    what it calls beside the rooms: the transformer, the samples, the logs
process/       command line, outcome, stop signals, failed ranks: nothing heavy, in force before torch
model/         the FLUX.1-Fill transformer, flow matching, bases in 4 and 8 bits
adapters/      LoRA, DoRA, LoKr: built, read, written
optimizers/    optimizers, the learning rate, and which optimizer state can be cut and moved
engines/       single, ddp, fsdp2, hsdp, ZeRO: one class each, behind one interface
checkpoints/   what a run goes on from: saved, found, resumed
export/        the adapter or model that a run leaves, read back and compared
validation/    pictures sampled with the live weights, and their figures
"""
