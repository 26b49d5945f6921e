"""A run on several nodes by hand: the line of `accelerate launch` for each."""

from collections.abc import Sequence

from configs.schema import Config
from launch.command import Node, check_node, choose_engine, render_command, render_environment, render_shell_line


def render_lines(
    config: Config,
    config_path: str,
    overrides: Sequence[str],
    *,
    nodes: int,
    processes_per_node: int,
    head: str,
    port: int,
    cores_per_node: int,
) -> list[str]:
    """One line for the shell of each node, the first node's first. Python and fluxfill lie in the same place on all.

    Under ZeRO, too, each line starts its own node's processes: the engine files ask for DeepSpeed's standard launcher,
    as its others start every node from one.
    """
    engine, total = choose_engine(config.parallel.engine, nodes * processes_per_node, nodes * processes_per_node)
    environment = render_environment(
        config.run.folder / "outcome.json", processes_per_node, cores_per_node, inherited={}
    )
    every = [check_node(Node(rank, nodes, head), port) for rank in range(nodes)]
    return [
        render_shell_line(render_command(config_path, overrides, engine, total, port, node), environment)
        for node in every
    ]
