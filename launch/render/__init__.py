"""`fluxfill render`: a run on several nodes as text for launchers other than SLURM.

accelerate.py  a line of `accelerate launch` for each node
kubernetes.py  a manifest for Kubernetes: a JobSet, or a PyTorchJob of Kubeflow's training operator
claims.py      what of a run the volumes of its pods hold
command.py     the command
"""
