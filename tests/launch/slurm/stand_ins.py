"""What scontrol says of a job, and an srun whose trainer leaves an outcome."""

import json
from pathlib import Path

RUNNING = (
    "JobId=12 JobName=a JobState=RUNNING Requeue=1 Restarts=0 RunTime=00:01:00 TimeLimit=01:00:00 NodeList=n0 Comment=x"
)


def ends_with(tmp_path: Path, code: int, step: int | None) -> str:
    told = json.dumps({"code": code, "reason": "so", "step": step})
    return f"echo '{told}' > {tmp_path}/r/outcome.json; exit 1"
