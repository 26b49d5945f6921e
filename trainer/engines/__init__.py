"""How the ranks of a run hold the model, exchange gradients, step, and hand out their state.

base.py says what every engine does; replicated.py (single, ddp), fsdp.py and zero.py are the kinds; start.py picks one.
ranks.py: the collectives.  slices.py: where a rank's share of the state lies.  ema.py averages over it.
"""
