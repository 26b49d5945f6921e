"""CPU seconds of the sheet that `fluxfill shards show --out x.png` draws, by the length of its captions.

    python benchmarks/grid.py [--out benchmarks/results/grid.jsonl] [--repeats 9]

Eight samples of 512 px, a line of three pictures each, whose latents the small VAE of the demo decodes; and the drawing
alone. One thread; the lengths alternate; medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.record import add_result
from data.encoders.encode import decode_latents
from data.encoders.load import load_vae
from data.show.picture_grid import GridItem, save_grid

ROOT = Path(__file__).resolve().parents[1]
LETTERS = (20, 2_200, 220_000)
SAMPLES, SIDE = 8, 512


def seconds_of(folder: Path, letters: int, vae, latents: torch.Tensor) -> tuple[float, float]:
    """CPU seconds of one sheet whose captions have so many letters, and those of its drawing alone."""
    caption = ("a sofa by the window " * (letters // 20 + 1))[:letters]
    start = time.process_time()
    decoded = [decode_latents(vae, latents) for _ in range(SAMPLES)]
    drawn_from = time.process_time()
    items = [GridItem([[*pair, pair[0]]], ["cat · 512x512 · hole 20%"], caption) for pair in decoded]
    save_grid(folder / "sheet.png", ("target", "what the model sees", "mask"), items)
    return time.process_time() - start, time.process_time() - drawn_from


def name(values: list[float]) -> dict[str, float]:
    return {str(letters): round(value, 3) for letters, value in zip(LETTERS, values, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append the result to this file, a JSON line")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    vae = load_vae(ROOT / "demo", device=torch.device("cpu"), dtype=torch.float32)
    latents = torch.randn(2, 16, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        seconds_of(Path(folder), LETTERS[0], vae, latents)  # which loads fonts
        runs = [
            [seconds_of(Path(folder), letters, vae, latents) for letters in LETTERS] for _ in range(options.repeats)
        ]
    whole, drawing = (
        [statistics.median(run[part] for run in of_length) for of_length in zip(*runs, strict=True)] for part in (0, 1)
    )
    line = {
        "benchmark": "grid",
        "samples": SAMPLES,
        "cpu_seconds": name(whole),
        "times_the_shortest": name([seconds / whole[0] for seconds in whole]),
        "drawing_alone": name([seconds / drawing[0] for seconds in drawing]),
    }
    add_result(line, options.out)


if __name__ == "__main__":
    main()
