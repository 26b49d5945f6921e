"""The command line `fluxfill`: a table of commands. Each is imported when it is called: --help comes in a moment."""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from configs.errors import InputError

# In the order in which they are needed: where each stands, and the first paragraph of its docstring, for the list.
COMMANDS = {
    "fetch": (
        "launch.fetch.command:fetch",
        "Get a model, so that jobs need no network. Run it where there is one, such as a login node.",
    ),
    "quickstart": (
        "launch.quickstart.command:quickstart",
        "Write a folder to train in, with a config for your GPUs. The script that takes your pictures over, and start "
        "scripts, are in it too.",
    ),
    "migrate": (
        "launch.migrate:migrate",
        "Make a dataset of another inpainting trainer's folders. Says what is wrong with them.",
    ),
    "import-config": (
        "launch.import_config:import_config",
        "Translate another trainer's config. Says for every key of it what became of it.",
    ),
    "check": (
        "launch.check.command:check",
        "Try everything that can fail before GPU hours burn. Packages, GPUs, model, pictures, cache, disk, memory, "
        "and two steps of training.",
    ),
    "plan": (
        "launch.plan.command:plan",
        "Say what a run would take on GPUs that need not be here. Chooses the engine by memory, time and network.",
    ),
    "preprocess": (
        "launch.preprocess:preprocess",
        "Encode the pictures once, as shards that training reads.",
    ),
    "train": (
        "launch.train:train",
        "Train on every GPU of this machine. Encodes what the cache lacks, then prints the command that trains, and "
        "runs it.",
    ),
    "status": (
        "launch.status.command:status",
        "Show where runs stand: step, loss, pace, time left. Restarts, checkpoint, validation and what is worrying, "
        "too.",
    ),
    "report": (
        "launch.report.command:report",
        "Write one HTML file that shows a run. Curves, what befell it, pictures by step, config, hardware, cost.",
    ),
    "watch": (
        "launch.report.command:watch",
        "Show runs in a browser while they train. The page of `fluxfill report`, live, several runs laid over each "
        "other.",
    ),
    "fill": (
        "launch.fill:fill",
        "Fill holes in your own pictures with what a run learned. Pictures keep their size.",
    ),
    "evaluate": (
        "launch.evaluate:evaluate",
        "Measure which checkpoint fills best. Says whether the difference is more than noise.",
    ),
    "export": (
        "launch.export:export",
        "Make of a checkpoint what other programs load. An adapter, or a whole FLUX.1-Fill, for the program that is "
        "named.",
    ),
    "gpus": (
        "launch.profiles.command:app",
        "List GPU profiles, or make one of this machine. --gpu takes them by name.",
    ),
    "shards": (
        "launch.shards:app",
        "Verify, repair and show the shards of a cache.",
    ),
    "slurm": (
        "launch.slurm.command:app",
        "Train on a SLURM cluster.",
    ),
    "preflight": (
        "launch.preflight.command:preflight",
        "Find out whether the nodes of a run are fit for it. Files, packages, clocks, GPUs, memory, and the network.",
    ),
    "render": (
        "launch.render.command:render",
        "Show how a launcher other than SLURM starts a run. The run is one on several nodes; nothing is started.",
    ),
    "doctor": (
        "launch.doctor.command:doctor",
        "Gather what a bug report needs. Versions, GPUs, environment, config, and the end of a run's logs.",
    ),
    "retire": (
        "launch.retire:retire",
        "Move the old trainer's files into a dated backup. The new run must have a checkpoint; --undo puts them back.",
    ),
    "config": (
        "launch.config:app",
        "Bring configs of earlier releases up to date.",
    ),
    "schema": (
        "launch.schema:schema",
        "Print the JSON Schema of configs. With it an editor completes keys and marks mistakes.",
    ),
}


class _Commands(TyperGroup):
    """Ends in exit code 2 (1: storage failed) and a plain message, no traceback, when what the user gave is wrong."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, _load(COMMANDS[name][0]) if name else None, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            from configs.supervision import exit_code  # and ctypes with it

            error.show()
            raise typer.Exit(exit_code(error)) from error


def _load(place: str) -> Any:
    """The command, or the group of commands, at `module:name`."""
    module, _, name = place.partition(":")
    found = getattr(import_module(module), name)
    if isinstance(found, typer.Typer):
        return get_group(found)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command()(found)
    return get_command(alone)


app = typer.Typer(
    name="fluxfill",
    cls=_Commands,
    help="Train FLUX.1 inpainting models (FLUX.1-Fill) from folders of pictures.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _name, (_, _line) in COMMANDS.items():
    app.command(_name, help=_line)(lambda: None)  # stands in the list; resolve_command gives the real one


def main() -> None:
    """Entry point of the program."""
    app()


if __name__ == "__main__":
    main()
