"""Simulations that another program asks for: a line of JSON each, on standard input and output.

    python -m trainer.simulation.run < asked.jsonl

asked: method (a config's section), precision, shape (FluxShape's fields), side (of a square picture, in pixels), text
(tokens), rows, checkpointed (blocks; null: all); keeps_fp32 if fp32 weights are computed with; base_pass if
flow.keep_target is base.
"""

import json
import sys
from dataclasses import asdict

from configs.errors import InputError
from configs.supervision import BAD_INPUT
from trainer.simulation import fake_cuda


def main() -> int:
    """Print what each step takes, as `Counted` has it."""
    try:
        fake_cuda.load()  # before torch
    except InputError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT

    from pydantic import TypeAdapter

    from configs.flux_shape import FluxShape
    from configs.step_costs import METHODS
    from data.samples.geometry import Bucket
    from trainer.simulation.step import StepKind, simulate_step

    for line in sys.stdin:
        asked = json.loads(line)
        kind = StepKind(
            TypeAdapter(METHODS).validate_python(asked["method"]),
            "bf16" if asked["precision"] == "auto" else asked["precision"],
            asked["checkpointed"],
            asked.get("keeps_fp32", False),
            asked.get("base_pass", False),
        )
        bucket = Bucket(asked["side"], asked["side"])
        counted = simulate_step(FluxShape(**asked["shape"]), kind, bucket, text=asked["text"], rows=asked["rows"])
        print(json.dumps(asdict(counted) | {"peak": counted.peak}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
