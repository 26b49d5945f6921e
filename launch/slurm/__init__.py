"""Training on a SLURM cluster, from the login node to the nodes of a job:

render.py      a config -> the text of batch scripts
submit.py      batch scripts -> jobs that wait for each other
command.py     `fluxfill slurm render|submit`
job.py         what a batch script runs: a step on all nodes, and how the job ends
node.py        what the step runs on each node: the launcher, under a supervisor
step.py        the command line of that step
allocation.py  what SLURM gave the job, and where its nodes meet
controller.py  what SLURM's controller says of the job, and what it is asked for
restarts.py    whether a job that ended starts again
"""
