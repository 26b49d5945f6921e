"""Batches -> a trained FLUX.1-Fill, room by room.

main.py        the recipe: a run from its config to its export, on one screen
method.py, training_data.py, run_log.py    what it calls beside the rooms: the transformer, the samples, the logs
guard.py       what becomes of updates that were not applied: skips, the way back to a good checkpoint, the stop
process/       command line, run owner, outcome, stop signals, launcher: nothing heavy, in force before torch
model/         the FLUX.1-Fill transformer, flow matching, bases in 4 and 8 bits
adapters/      LoRA, DoRA, LoKr: built, read, written
optimizers/    optimizers, the learning rate, and which optimizer state can be cut and moved
engines/       single, ddp, fsdp2, hsdp, ZeRO: one class each, behind one interface
checkpoints/   what a run goes on from: saved, found, resumed
export/        the adapter or model that a run leaves, read back and compared
simulation/    what a step takes, by fake tensors on a CUDA device that is none; `fluxfill plan` reads its table
validation/    pictures sampled with the live weights, and their figures
evaluation/    fills of pictures of one's own, and checkpoints measured against each other
"""
