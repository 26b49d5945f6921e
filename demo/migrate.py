"""The move from an old set-up of three folders, on a CPU: old triples, some of them wrong -> quickstart -> migrate ->
check -> training -> the old code put away. Every step is what a user types.

make migrate-demo                          (or: python demo/migrate.py [--folder FOLDER])
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console

from configs.supervision import BAD_INPUT, FAILED
from data.migrate.report import REPORT, MigrationReport, read_report
from demo.old_folders import Planted, make_old_folders
from demo.run import make_model, run_command

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "migrate-demo"
OLD_CODE = "old-trainer/jobs/process/TrainFineTuneProcess.py"
STEPS = 200
# For a tiny model on a CPU, where quickstart wrote a config for FLUX.1-Fill on a GPU.
SMALL = (
    *("model.precision=auto", "data.resolution=64", "data.captions.text_length=16", "train.optimizer=adamw"),
    *("train.lr=4e-3", "train.global_batch_size=8", "train.micro_batch_size=8", "train.activation_checkpointing=false"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Move 40 old triples to fluxfill and train on them, on a CPU.")
    parser.add_argument("--folder", type=Path, help="a new folder to work in; by default runs/migrate-demo")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training; by default {STEPS}")
    options = parser.parse_args()
    if options.folder is not None and options.folder.exists():
        print(f"demo/migrate.py: --folder {options.folder} is there already. Give a new one.", file=sys.stderr)
        return BAD_INPUT
    if options.folder is None:
        shutil.rmtree(FOLDER, ignore_errors=True)
    folder = (options.folder or FOLDER).absolute()
    start = time.monotonic()
    console = Console()
    planted = make_old_set_up(folder, console)
    walk(folder, planted, [*SMALL, f"train.steps={options.steps}"], console)
    as_planted = report(folder / "flux-inpainting", planted, console)
    console.print(f"\nThe whole walk took {(time.monotonic() - start) / 60:.1f} minutes.")
    return 0 if as_planted else FAILED


def make_old_set_up(folder: Path, console: Console) -> Planted:
    """Write three old folders, the old trainer's code and a tiny FLUX-Fill into a new folder."""
    console.rule("[bold]1  an old set-up")
    say(console, "Three folders of photographs, masks and masked photographs. Some are wrong, as in real folders.")
    planted = make_old_folders(folder / "old pictures")
    code = folder / OLD_CODE
    code.parent.mkdir(parents=True)
    code.write_text("# The old trainer's own training loop stood here.\n", encoding="utf-8")
    make_model(folder / "model")
    say(console, f"{planted.target.parent}: {len(planted.good)} good triples, {len(planted.faults)} with a fault")
    say(console, f"{folder / 'model'}: a FLUX-Fill of 5.3 M parameters, random")
    return planted


def walk(folder: Path, planted: Planted, overrides: list[str], console: Console) -> None:
    """Go from quickstart to the backup of the old code, and end in FOLDER/flux-inpainting. Ends the program if a
    command fails."""

    def step(title: str, why: str, *command: str) -> None:
        console.rule(f"[bold]{title}")
        say(console, why)
        if command:
            run_command(list(command), console)

    os.chdir(folder)
    step(
        "2  quickstart",
        "Writes a folder to train in: the config for your GPU, scripts, a README.md.",
        *("fluxfill", "quickstart", "--gpu-memory", "24GB", "--num-gpus", "1", "--model", "model"),
    )
    os.chdir("flux-inpainting")
    step("3  three paths", "You write your folders into migrate_your_data.py:")
    for line in edit_paths(Path("migrate_your_data.py"), planted):
        say(console, f"    {line}")
    step(
        "4  migrate",
        "Looks at the pixels, leaves out what is wrong and says why, and enters the rest in the config.",
        *("python", "migrate_your_data.py"),
    )
    step(
        "5  check",
        "Tries everything that could fail later, and ends with two real steps of training. (The keys that are set\n"
        "here and below are for the tiny model on a CPU; with FLUX.1-Fill on your GPU you need none.)",
        *("fluxfill", "check", "train_flux_inpainting.yaml", *overrides),
    )
    step(
        "6  train",
        "Encodes the pictures once, then trains. Stopped at any moment, the same line goes on.",
        *("./start_training.sh", *overrides),
    )
    step(
        "7  retire",
        "Puts the old code away, now that the new run has a checkpoint.",
        *("fluxfill", "retire", f"../{OLD_CODE}", "--after", "runs/flux_inpainting", "--backup", "../backup"),
    )


def edit_paths(script: Path, planted: Planted) -> list[str]:
    """Write the old folders into migrate_your_data.py; the lines that are changed."""
    before = text = script.read_text(encoding="utf-8")
    for folder in (planted.target, planted.masked, planted.mask):
        text = text.replace(f"/path/to/your/{folder.name}", str(folder))
    script.write_text(text, encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line not in before.splitlines()]


def report(folder: Path, planted: Planted, console: Console) -> bool:
    """Say where all that came out lies, as links. Whether what was planted was found, and nothing else."""
    console.rule("[bold]8  what came out")
    wrong = judged_otherwise(read_report(folder / "dataset" / REPORT), planted)
    counts = f"{len(planted.faults)} planted faults were found and named, and all {len(planted.good)} good triples kept"
    say(console, f"Not as planted: {', '.join(sorted(wrong))}" if wrong else f"All {counts}.")
    say(console, "The pictures are those of a tiny random model after a minute; make demo shows what it can learn.")
    run = folder / "runs" / "flux_inpainting"
    for what, path in (
        ("report", folder / "dataset" / "report.html"),
        ("pictures", max(run.glob("samples/step-*-train.png"))),
        ("LoRA", run / "final"),
        ("what to do", folder / "README.md"),
    ):
        say(console, f"{what:>10}  {path.as_uri()}")
    return not wrong


def judged_otherwise(found: MigrationReport, planted: Planted) -> set[str]:
    """Names of triples that migrate did not judge as they were planted: kept or left out, and of which kind."""
    named = {triple.name: triple.problems[0].kind for triple in found.quarantined}
    kept = {triple.name.partition("/")[2] for triple in found.kept}  # with_mask/name
    return {name for name, _ in named.items() ^ planted.faults.items()} | kept ^ planted.good


def say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
