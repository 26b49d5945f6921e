"""The command `fluxfill schema`."""

import json

from configs.loading import json_schema
from launch.arguments import OutFile, print_or_write


def schema(out: OutFile = None) -> None:
    """Print the JSON Schema of configs. With it an editor completes keys and marks mistakes.

    Example: fluxfill schema --out configs/schema.json
    """
    print_or_write(json.dumps(json_schema(), indent=2) + "\n", out)
