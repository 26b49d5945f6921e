"""The whole path on real photographs, on a CPU: pictures -> triples -> shards -> training -> filled holes.

make demo                                  (or: python demo/run.py [--num-processes 2])
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from demo.photographs import write_triples

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("demo/work")
CONFIG = Path("configs/demo.yaml")
RUN = Path("runs/demo")
_SAMPLED_STEP = "samples/step-{step:08d}-train.png"


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a tiny FLUX-Fill on photographs, on a CPU, in a few minutes.")
    parser.add_argument("--num-processes", type=int, default=1, help="1: single; more: ddp, with the same losses")
    options = parser.parse_args()
    os.chdir(ROOT)
    console = Console()
    start = time.monotonic()
    console.rule("[bold]1  photographs -> three folders of triples, and a tiny FLUX-Fill")
    make_inputs(WORK)
    console.print(f"{WORK}/triples: target, source and mask of 96 crops; {WORK}/model: 5.3 M parameters, random")
    console.rule("[bold]2  VAE, CLIP and T5 encode everything once, then train")
    for left in (WORK / "cache", RUN):  # else it would go on from the last demo
        shutil.rmtree(left, ignore_errors=True)
    run_command(["fluxfill", "train", str(CONFIG), "--num-processes", str(options.num_processes)], console)
    console.rule("[bold]3  what came out")
    report(console)
    console.print(f"\nThe whole demo took {(time.monotonic() - start) / 60:.1f} minutes.\n")
    next_steps(console)
    return 0


def make_inputs(folder: Path) -> None:
    """Write the triples and the model into a folder; in a process of its own, whose memory goes with it.

    Those of an earlier demo are replaced: it may have been another release's, with another model.
    """
    for name in ("triples", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_triples(folder / "triples")
    make_model(folder / "model")


def make_model(folder: Path) -> None:
    """Write the tiny FLUX-Fill into a folder; in a process of its own, whose memory goes with it."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from configs.lighter_imports import lighten_imports\n"
        "from configs.library_warnings import quiet_libraries\n"
        "lighten_imports()\n"
        "quiet_libraries()\n"
        "from demo.tiny_model import build_tiny_model\n"
        "build_tiny_model(Path(sys.argv[1]))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)


def run_command(command: list[str], console: Console) -> None:
    """Show a command, run it beside this interpreter, and end the demo with its exit code if it fails."""
    console.print(f"$ {shlex.join(command)}", style="dim", markup=False, highlight=False, soft_wrap=True)
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    code = subprocess.run(command, env=environment).returncode
    if code:
        sys.exit(code)


def read_validation() -> dict:
    """The last line of validation.jsonl."""
    return json.loads((RUN / "validation.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def report(console: Console) -> None:
    """PSNR inside the hole as a table, and where the pictures are."""
    line = read_validation()
    table = Table(
        title="PSNR inside the hole in dB, mean over crops; ceiling: the VAE's own round trip", title_justify="left"
    )
    table.add_column("crops")
    for column in ("number", "untrained", "trained", "ceiling", "gain", "missing"):
        table.add_column(column, justify="right")
    for split, name in (("train", "trained on"), ("holdout", "held out")):
        figures = line[split]
        untrained, trained = figures["hole_psnr_untrained"], figures["hole_psnr"]
        ceiling = figures["hole_psnr_ceiling"]
        numbers = (untrained, trained, ceiling, trained - untrained, ceiling - trained)
        table.add_row(name, str(figures["items"]), *(f"{number:.2f}" for number in numbers))
    console.print(table)
    console.print(
        "It has learned its 48 training crops by heart, which shows that every part of the path is right. Held-out "
        "crops are beyond it: 48 pictures and a few minutes make no inpainting model."
    )
    for what, where in (
        ("pictures", f"{RUN / _SAMPLED_STEP.format(step=line['step'])}   (target, hole, filled, mask)"),
        ("model", f"{RUN / 'final'}   (FluxFillPipeline.from_pretrained loads it)"),
        ("curves", f"tensorboard --logdir {RUN / 'tensorboard'}"),
    ):
        console.print(f"{what:>10}  {where}", highlight=False, soft_wrap=True)


def next_steps(console: Console) -> None:
    """The commands that a user types next."""
    console.print("[bold]Next, with pictures of your own")
    for command, note in (
        ("cp configs/fill_lora.yaml my.yaml", "and put your folders under data.datasets"),
        (".venv/bin/fluxfill train my.yaml", "encodes them once and trains; goes on where it was stopped"),
    ):
        console.print(f"  {command:<40}[dim]# {note}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
