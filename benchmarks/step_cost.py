"""What a micro-step of the 12 B FLUX.1-Fill costs on CUDA, of two builds, counted without a GPU.

    python benchmarks/step_cost.py [--against e09f022] [--whole] [--out benchmarks/results/step_cost.jsonl]

Of this tree and of a commit, checked out for the time: each build's own model, adapters, quantized layers, flow and
loss run on fake tensors of a pretended CUDA device, by this tree's counter. One sample of 1024 x 1024, 512 tokens of
text. Traffic is what all but matrix products and attention read and write. One double and two single blocks times 19
are the model's exact mix; --whole runs all 57 blocks for the headlines too.
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GB, GIB = 1e9, 2**30
LORA, DORA, FULL = {"type": "lora", "rank": 32}, {"type": "dora", "rank": 32}, {"type": "full"}
# name: method, base's precision, whether blocks are checkpointed, whether full training computes with fp32 weights
CASES: dict[str, tuple[dict, str, bool, bool]] = {
    "lora, checkpointing": (LORA, "bf16", True, False),
    "lora": (LORA, "bf16", False, False),
    "lora int8, checkpointing": (LORA, "int8", True, False),
    "lora fp8, checkpointing": (LORA, "fp8", True, False),
    "dora, checkpointing": (DORA, "bf16", True, False),
    "full sharded, checkpointing": (FULL, "bf16", True, False),
    "full sharded": (FULL, "bf16", False, False),
    "full single, checkpointing": (FULL, "bf16", True, True),
    "full single": (FULL, "bf16", False, True),
}
WHOLE = ("lora, checkpointing", "lora")
# Names of the code that a step runs, where they stood before the rooms of trainer/ and data/.
_FORMER = {
    "data.batches.micro_batch": "data.micro_batch",
    "data.samples.geometry": "data.geometry",
    "trainer.adapters.build": "trainer.adapter",
    "trainer.model.flow": "trainer.flow",
    "trainer.model.flux": "trainer.flux",
    "trainer.model.quantize": "trainer.quantize",
}


def count_build(tree: Path, cases: list[str], whole: bool) -> None:
    """Print a line of JSON for each case: of the code in `tree`, which is the first of sys.path."""
    fake_cuda = _load("trainer.simulation.fake_cuda", ROOT)
    fake_cuda.load()  # before torch
    _load("trainer.simulation.count", ROOT)
    if not (tree / "trainer/simulation/step.py").exists():
        _give_former_names()
    step = _load("trainer.simulation.step", ROOT if not (tree / "trainer/simulation/step.py").exists() else tree)
    from pydantic import TypeAdapter

    from configs.flux_shape import FluxShape
    from configs.schema import DoraConfig, FullConfig, LoraConfig
    from data.samples.geometry import Bucket

    methods: TypeAdapter[Any] = TypeAdapter(LoraConfig | DoraConfig | FullConfig)
    for name in cases:
        method, precision, checkpointing, in_fp32 = CASES[name]
        kind = step.StepKind(methods.validate_python(method), precision, None if checkpointing else 0, in_fp32)
        for shape, times in [(FluxShape(1, 2), 19), *([(FluxShape(), 1)] if whole and name in WHOLE else [])]:
            counted = step.simulate_step(shape, kind, Bucket(1024, 1024), text=512)
            line = {"case": name, "blocks": shape.blocks, "traffic_gb": times * counted.traffic / GB}
            line |= {"kept_gib": times * counted.kept / GIB, "kernels": times * counted.kernels}
            line |= {"matmul_tflop": times * counted.matmul_flops / 1e12}
            if times == 1:
                line["peak_above_weights_gib"] = counted.peak / GIB
            print(json.dumps(line), flush=True)


def _load(name: str, tree: Path) -> Any:
    """A module by the file of a tree, under its usual name."""
    spec = importlib.util.spec_from_file_location(name, tree / f"{name.replace('.', '/')}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _place(name, module)
    spec.loader.exec_module(module)
    return module


def _place(name: str, module: ModuleType) -> None:
    """Let a module be imported by a name, whose packages may not exist."""
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            try:
                importlib.import_module(parent)
            except ImportError:
                _place(parent, ModuleType(parent))
        setattr(sys.modules[parent], child, module)


def _give_former_names() -> None:
    """Let this tree's trainer/simulation/step.py run the code of a build from before the rooms: the same lines, which
    call that build's functions. Its autocast and its checkpointing, too, are as that build had them."""
    import torch

    for name in ("configs.adapter_targets", "configs.flux_shape"):
        _load(name, ROOT)
    for name, former in _FORMER.items():
        _place(name, importlib.import_module(former))

    import_module: Any = importlib.import_module  # what a module held then is not known here
    combinations, geometry = import_module("configs.combinations"), import_module("data.geometry")
    adapter, flux, quantize = (import_module(f"trainer.{name}") for name in ("adapter", "flux", "quantize"))
    adapter.AdapterConfig = adapter.LoraConfig | adapter.DoraConfig | adapter.LokrConfig
    combinations.QUANTIZED = quantize.QUANTIZED
    geometry.Bucket.latent_shape = property(lambda bucket: (16, *bucket.latent_size))
    predict = flux.predict_velocity

    def predict_under_autocast(*given: Any) -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):  # Engine.autocast
            return predict(*given)

    flux.predict_velocity = predict_under_autocast
    flow, batch = import_module("trainer.flow"), import_module("data.micro_batch")
    loss = flow.flow_loss
    batch.MicroBatch.hole = property(lambda rows: batch.unpack_mask(rows.mask))
    flow.velocity_target = lambda _, noisy, rows, *__: (rows.latents, rows.noise)  # of which that loss made it
    flow.flow_loss = lambda velocity, target, region: loss(velocity, *target, region)

    def checkpoint_blocks(transformer: Any, count: int) -> None:
        if count:
            transformer.enable_gradient_checkpointing()

    checkpointing, dtype = ModuleType("checkpointing"), ModuleType("compute_dtype")
    checkpointing.checkpoint_blocks = checkpoint_blocks  # type: ignore[attr-defined]
    dtype.compute_in = lambda *_: None  # type: ignore[attr-defined]
    _place("trainer.model.checkpointing", checkpointing)
    _place("trainer.model.compute_dtype", dtype)


@contextmanager
def check_out(commit: str) -> Iterator[Path]:
    """The tree of a commit, for the time."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def run_build(tree: Path, cases: list[str], whole: bool) -> dict[tuple[str, int], dict]:
    """(case, blocks) -> what was counted, by a process that imports the tree's code."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-P", __file__, "--count", str(tree), *(["--whole"] if whole else []), *cases]
    made = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in made.stdout.splitlines()]
    return {(line["case"], line["blocks"]): line for line in lines}


def targets(before: dict, after: dict) -> list[tuple[str, float, float, float]]:
    """(what, before, after, the most it may be), of two builds' counts."""

    def of(build: dict, case: str, what: str) -> float:
        found = [line[what] for (name, _), line in sorted(build.items()) if name == case and what in line]
        return found[-1] if found else float("nan")  # of all blocks, where they were run

    def by_three(build: dict, case: str) -> float:
        return build[case, 3]["traffic_gb"]

    rows = []
    for case, what, unit, share in (
        ("lora, checkpointing", "traffic_gb", "GB", 0.62),
        ("lora", "traffic_gb", "GB", 0.62),
        ("lora", "kept_gib", "GiB", 0.76),
    ):
        old, new = of(before, case, what), of(after, case, what)
        rows.append((f"{case}: {what.rpartition('_')[0]}, {unit}", old, new, share * old))
    peak = "peak_above_weights_gib"
    case = "lora, checkpointing"
    rows.append((f"{case}: peak above weights, GiB", of(before, case, peak), of(after, case, peak), 2.2))
    for more, share in (("lora int8", 0.2), ("lora fp8", 0.2), ("dora", 0.15)):
        old, new = (by_three(b, f"{more}, checkpointing") - by_three(b, "lora, checkpointing") for b in (before, after))
        rows.append((f"{more}: traffic above a bf16 lora's, GB", old, new, share * old))
    for case in ("full single, checkpointing", "full single"):
        sharded = case.replace("single", "sharded")
        old, new = (b[case, 3]["kept_gib"] - b[sharded, 3]["kept_gib"] for b in (before, after))
        rows.append((f"{case}: kept above a sharded one's (weight copies), GiB", old, new, 0.0))
        rows.append((f"{case}: traffic, GB", by_three(before, case), by_three(after, case), by_three(before, case)))
    case = "full sharded, checkpointing"
    rows.append((f"{case}: traffic, GB", by_three(before, case), by_three(after, case), by_three(before, case)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="e09f022", help="the commit to compare with")
    parser.add_argument("--whole", action="store_true", help="all blocks too, where peaks are compared")
    parser.add_argument("--out", type=Path, help="write the results to this file, a JSON line each")
    parser.add_argument("--count", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("cases", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count is not None:
        return count_build(options.count, options.cases, options.whole)
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", options.against]
    commit = subprocess.run(git, capture_output=True, text=True, check=True)
    counted = {}
    with check_out(options.against) as former:
        for build, tree in (("before", former), ("after", ROOT)):
            counted[build] = run_build(tree, list(CASES), options.whole)
    lines = [
        {"benchmark": "step_cost", "build": build, "against": commit.stdout.strip()}
        | {name: round(value, 2) if isinstance(value, float) else value for name, value in line.items()}
        for build, of in counted.items()
        for line in of.values()
    ]
    print(f"{'':66} {'before':>9} {'after':>9} {'ratio':>6} {'at most':>9}")
    for what, old_value, new_value, limit in targets(counted["before"], counted["after"]):
        ratio = f"{new_value / old_value:6.2f}" if abs(old_value) > 0.05 else f"{'':6}"
        verdict = "" if new_value <= limit + 0.05 else "  not met"
        print(f"{what:66} {old_value:9.1f} {new_value:9.1f} {ratio} {limit:9.1f}{verdict}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
