"""What `accelerate launch` gives a rank of an engine to know, for processes that are started without it."""

import os
from pathlib import Path

ENGINES = Path(__file__).resolve().parent.parent / "configs" / "engines"


def launch_environment(engine: str, num_processes: int) -> dict[str, str]:
    """What `accelerate launch --config_file configs/engines/<engine>.yaml` adds to a rank's environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    line = ["--config_file", str(ENGINES / f"{engine}.yaml"), "--num_processes", str(num_processes)]
    arguments = launch_command_parser().parse_args([*line, "--main_process_port", "0", "trainer/main.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    before = dict(os.environ)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    wanted = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
    return {name: value for name, value in environment.items() if name.startswith(wanted) and before.get(name) != value}
