"""`fluxfill status`: where runs stand, by what they and their jobs have left in their folders. Needs no access but to
read them, and no SLURM.

tail.py     the last lines of a log, however large, whole or not
run.py      one run's folder -> its state, figures, checkpoint and restarts
worries.py  what somebody should look at
jobs.py     a job's id -> the run's folder, and what SLURM says of the job
report.py   the page of one run, the table of many, JSON
command.py  the command
"""
