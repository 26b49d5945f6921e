"""`fluxfill quickstart`: a folder to train in, from the memory and the number of the GPUs.

choices.py decides, render.py makes the text of each file, folder.py writes them and keeps what was edited; command.py
is the command line. seed_names.py is the table of what the AI-toolkit migration's files, keys and claims are here.
"""
