"""`fluxfill preflight`: what can be wrong with the nodes of a run is found before weights load, in under two minutes.

place.py         which node of how many this is: in a step of SLURM's, under `accelerate launch`, or alone
node.py          what one node finds about itself, without torch
host_memory.py   the memory that loading and saving take on a node, against what it has
exchange.py      the nodes' reports at the first one, which waits for no dead node
all_reduce.py    the program of one rank: matrix products, a ring of nodes, an all-reduce
ranks.py         a node's ranks of that program, with a deadline
compare.py       the reports of all nodes -> what is wrong, and with which node
result.py        preflight.json, by which the job decides whether it starts again, and without which nodes
run.py           all of it in order
command.py       the command
"""
