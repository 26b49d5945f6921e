"""The page of a run: `fluxfill report` writes it, `fluxfill watch` serves it while runs write.

json_log  a log of JSON lines, read as it grows
curves    its figures as points of a curve, thinned, peaks kept
sessions  the starts of a run: what each ran on, how long, and what that cost
marks     what befell the run, for the time axis
settings  its config beside the nearest recipe
run       all of it, as the JSON that the page draws
page      the page;  serve: the server on loopback
"""
