"""FLUX.1-Fill of 12 B on a GPU: seconds and memory of the trainer's own steps, the most telling cases first.

    python -m benchmarks.gpu [--minutes 8] [--out benchmarks/results/gpu.jsonl]
    python -m benchmarks.gpu --tiny     all of it on a small model, on a CPU too
    python -m benchmarks.gpu --table    what was measured, and what was not yet, in Markdown

Weights are random and made on the device, samples come from shards of the real format, and each case is a run of
trainer/main.py, observed from outside. Before any of it, the first steps of a small model are compared with those that
the CPU of the same machine takes. One line of JSON a case is appended to --out; a case that has one for this device and
commit is passed over, so the same command goes on where the time ended. What fails is written down, of its case alone.

Where a package is missing, what needs it is left out, and the line says so; CONTRIBUTING.md says what to carry to a
machine without a network. This file itself needs no package.

MFU is a share of the card's own rate in bf16 matrix products, which is measured first; what is computed twice, as in
checkpointed blocks, does not count.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "gpu.jsonl"
# Packages that the trainer, or the writer of shards, cannot be imported without.
NEEDED = (
    *("diffusers", "importlib_metadata", "requests", "PIL", "transformers", "accelerate", "peft", "safetensors"),
    *("numpy", "pydantic", "yaml", "rich", "webdataset", "braceexpand", "xxhash", "fsspec"),
)
CASE_SECONDS = 120.0  # after which a case is given up
LEAST_SECONDS = 25.0  # with fewer left none is begun
LEFT_GIB = 0.5  # that a case may leave to the next one
NO_TIME, NO_PARITY = "no time was left", "it does not compute what the CPU computes"
TOLERANCE = 0.15  # of a gradient; bf16 is 0.02 away from fp32, a kernel that is wrong half of it and more


@dataclass(frozen=True)
class Kind:
    """What a step computes, over a LoRA of rank 16.  settings: key=value.  needs: packages.  like: the kind of which it
    computes the same in another way, by more settings (how)."""

    settings: tuple[str, ...]
    needs: tuple[str, ...] = ()
    how: tuple[str, ...] = ()
    like: str | None = None


@dataclass(frozen=True)
class Case:
    """One run.  about: in the table.  side: of its pictures.  samples: of an update.  settings: over micro-batches of
    one."""

    name: str
    about: str
    kind: str
    side: int
    samples: int = 1
    settings: tuple[str, ...] = ()


FULL, BF16, AUTO = "method={type: full}", ("model.precision=bf16",), ("train.micro_batch_size=auto",)
KINDS = {
    "bf16": Kind(BF16),
    "compiled": Kind(BF16, how=("train.compile=regional",), like="bf16"),
    "rounded": Kind((FULL, "train.weights=bf16_stochastic")),
    "adamw8bit": Kind((FULL, *BF16, "train.optimizer=adamw8bit"), ("bitsandbytes",)),
    "nf4": Kind(("model.precision=nf4",), ("bitsandbytes",)),
    "int8": Kind(("model.precision=int8",), ("torchao",)),
    "flash": Kind(BF16, how=("train.attention=flash",), like="bf16"),
}
OURS, SEED = "lora-1024-compiled", "seed-1024"
CASES = (
    Case("lora-1024", "LoRA, 1024 px, micro-batch 1", "bf16", 1024),
    Case("lora-1024-auto-compiled", "LoRA, 1024 px, micro-batch auto, compiled", "compiled", 1024, 8, AUTO),
    Case(SEED, "LoRA, 1024 px, the seed's way: VAE, CLIP and T5 in every step", "bf16", 1024),
    Case(OURS, "LoRA, 1024 px, micro-batch 1, compiled", "compiled", 1024),
    Case("full-512-rounded", "full, 512 px, micro-batch auto, bf16 with stochastic rounding", "rounded", 512, 8, AUTO),
    Case("full-512-adamw8bit", "full, 512 px, micro-batch auto, 8-bit Adam", "adamw8bit", 512, 8, AUTO),
    Case("lora-512-auto-compiled", "LoRA, 512 px, micro-batch auto, compiled", "compiled", 512, 16, AUTO),
    Case("lora-512", "LoRA, 512 px, micro-batch 1", "bf16", 512),
    Case("lora-1024-nf4", "LoRA on nf4, 1024 px, micro-batch 1", "nf4", 1024),
    Case("lora-1024-int8", "LoRA on int8, 1024 px, micro-batch 1", "int8", 1024),
    Case("lora-1024-flash", "LoRA, 1024 px, micro-batch 1, FlashAttention", "flash", 1024),
)


class Failed(Exception):
    """A job came to no result.  timed_out: in the time that it was given."""

    def __init__(self, reason: str, *, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


def serve(connection: Connection, log: Path, *, on_cpu: bool, ready: bool) -> None:
    """Do what the connection asks for, (module, function, arguments) each, until it is closed; a process of its own."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    # As a run has them; torch reads them at the first use of the GPU, which here is none of a run's.
    os.environ |= importlib.import_module("configs.gpu_allocator").allocator_settings(os.environ)
    if ready:
        with suppress(ImportError):  # of which a job will tell
            importlib.import_module("benchmarks.gpu_case")
    while True:
        try:
            module, function, named = connection.recv()
        except EOFError:
            return
        try:
            reply = {"result": getattr(importlib.import_module(f"benchmarks.{module}"), function)(**named)}
        except BaseException as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
        connection.send(reply)


class Worker:
    """A process that runs jobs: one that dies, or never ends, takes nobody with it.  folder: of its log.  ready: it
    imports the trainer before it is asked for anything."""

    def __init__(self, folder: Path, *, on_cpu: bool = False, ready: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log"
        self._log.touch()
        self._connection, theirs = context.Pipe()
        given = {"on_cpu": on_cpu, "ready": ready}
        self._process = context.Process(target=serve, args=(theirs, self._log), kwargs=given, daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, module: str, function: str, **named: Any) -> None:
        self._connection.send((module, function, named))

    def answer(self, seconds: float) -> Any:
        """Of the job that was begun. Raises Failed, and then the worker is of no more use."""
        try:
            if not self._connection.poll(seconds):
                self._fail(f"no end after {seconds:.0f} s", timed_out=True)
            reply = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(10)
            self._fail(f"its process died, exit code {self._process.exitcode}")
        if "error" in reply:
            self._fail(reply["error"])
        return reply["result"]

    def _fail(self, reason: str, *, timed_out: bool = False) -> NoReturn:
        self.close()
        tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        print("\n".join(tail), file=sys.stderr, flush=True)
        raise Failed(reason, timed_out=timed_out)

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join(10)


class Measurement:
    """The cases on one machine.  out: where lines go; None: to the screen alone.  minutes: of it all.  tiny: with a
    small model, on whatever there is."""

    def __init__(self, folder: Path, out: Path | None, *, minutes: float, tiny: bool) -> None:
        self._folder, self._out, self._tiny = folder, out, tiny
        self._deadline = time.monotonic() + 60 * minutes
        self._about: dict[str, Any] = {"device": None, "commit": commit()}
        self._workers: dict[str, Worker] = {}
        self._references: dict[str, Path] = {}
        self._ready = self._seconds_left() > self._least_seconds and all(map(is_there, NEEDED))

    def run(self, cases: Sequence[Case]) -> int:
        """Exit code: 0; 1 if the device computes something else than the CPU; 2 where nothing can be measured."""
        if not is_there("torch"):
            for case in cases:
                self._tell("gpu", case=case.name, skipped="needs torch")
            return 2
        if self._ready:  # at the same time
            self._worker("reference")
        card = self._ask("device", "gpu_card", "describe")
        self._about |= {name: card[name] for name in ("device", "memory_gib", "torch")}
        if card["device"] == "cpu" and not self._tiny:
            print("torch sees no GPU: nothing to measure. --tiny goes through all of it on a CPU.", file=sys.stderr)
            return 2
        rate = self._ask("device", "gpu_card", "matmul_rate", side=256 if self._tiny else 8192)
        self._about["matmul_tflops"] = round(rate, 3)
        done = {line["case"] for line in read_lines(self._out) if self._is_result_here(line)}
        agrees: dict[str, str | None] = {}  # why a kind is not measured
        for case in cases:
            if case.name in done:
                continue
            if case.kind not in agrees:
                agrees[case.kind] = self._compare_with_cpu(case.kind)
            self._tell("gpu", case=case.name, **self._measure(case, agrees[case.kind]))
        for worker in self._workers.values():
            worker.close()
        return int(any(reason == NO_PARITY for reason in agrees.values()))

    def _is_result_here(self, line: dict[str, Any]) -> bool:
        here = all(line.get(name) == self._about[name] for name in ("device", "commit"))
        return here and line["benchmark"] == "gpu" and "skipped" not in line

    def _worker(self, which: str) -> Worker:
        if which not in self._workers:
            on_cpu = which == "reference"
            self._workers[which] = Worker(self._folder / which, on_cpu=on_cpu, ready=self._ready)
        return self._workers[which]

    def _ask(self, which: str, module: str, function: str, *, seconds: float = CASE_SECONDS, **named: Any) -> Any:
        """A worker's result. Raises Failed; the next job gets a new process."""
        if self._tiny:
            seconds = 10 * CASE_SECONDS  # a CPU may have much else to do
        try:
            self._worker(which).begin(module, function, **named)
            return self._worker(which).answer(seconds)
        except Failed:
            del self._workers[which]
            raise

    def _seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def _compare_with_cpu(self, name: str) -> str | None:
        """One step of a small model on the device and on the CPU; why no case of the kind is measured, if none is."""
        kind = KINDS[name]
        if missing := [package for package in (*NEEDED, *kind.needs) if not is_there(package)]:
            return f"needs {', '.join(missing)}"
        if self._seconds_left() < self._least_seconds:
            return NO_TIME
        base = kind.like or name
        try:
            if base not in self._references:
                job: dict[str, Any] = {"kind": base, "settings": kind.settings, "folder": self._folder / "reference"}
                self._references[base] = self._ask("reference", "gpu_case", "parity", **job)
            job = {"kind": name, "settings": (*kind.settings, *kind.how), "folder": self._folder / "device"}
            found = self._ask("device", "gpu_case", "parity", **job)
            apart = self._ask("device", "gpu_case", "distances", found=found, expected=self._references[base])
        except Failed as error:
            self._tell("gpu_parity", kind=name, error=str(error))
            return f"not known whether it computes what the CPU does: {error}"
        self._tell("gpu_parity", kind=name, **{share: round(number, 5) for share, number in apart.items()})
        return None if apart["furthest"] <= TOLERANCE else NO_PARITY

    @property
    def _least_seconds(self) -> float:
        return 1.0 if self._tiny else LEAST_SECONDS

    def _measure(self, case: Case, reason: str | None) -> dict[str, Any]:
        """Of a line: figures, or error, or skipped."""
        left = self._seconds_left()
        if reason == NO_PARITY:
            return {"error": reason}
        if reason is not None or left < self._least_seconds:
            return {"skipped": reason or NO_TIME}
        job: dict[str, Any] = {"name": case.name, "side": case.side, "samples": case.samples, "tiny": self._tiny}
        job |= {"folder": self._folder / "device", "seconds": min(left, CASE_SECONDS)}
        try:
            if case.name == SEED:
                found = self._ask("device", "gpu_case", "measure_seed", **job)
            else:
                kind = KINDS[case.kind]
                job["settings"] = (*kind.settings, *kind.how, *case.settings)
                found = self._ask("device", "gpu_case", "measure", **job)
            if self._ask("device", "gpu_case", "left_gib") > LEFT_GIB:
                self._workers.pop("device").close()  # what is still held would be counted as the next case's
        except Failed as error:
            if error.timed_out and left < CASE_SECONDS:
                return {"skipped": NO_TIME}
            return {"error": str(error)}
        return found | {"mfu": round(found["tflop_per_second"] / self._about["matmul_tflops"], 4)}

    def _tell(self, benchmark: str, **found: Any) -> None:
        line = json.dumps({"benchmark": benchmark, **found, **self._about})
        print(line, flush=True)
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            with self._out.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")


def is_there(package: str) -> bool:
    """Whether it is installed; without importing it."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def read_lines(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def commit() -> str:
    """Of the code that is measured: git's, or where that is not there, or the code was changed, a hash of its files."""
    code = ("configs", "data", "trainer", "benchmarks")
    with suppress(OSError, subprocess.CalledProcessError):
        ask: dict[str, Any] = {"cwd": ROOT, "check": True, "capture_output": True, "text": True}
        if not subprocess.run(["git", "status", "--porcelain", "--", *code, f":!{OUT.parent}"], **ask).stdout:
            return subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **ask).stdout.strip()
    digest = hashlib.sha256()
    for path in sorted(path for folder in code for path in (ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return f"files-{digest.hexdigest()[:12]}"


HEAD = ("case", "s/step", "samples/s", "MFU", "peak, GiB", "by plan, GiB")


def render_table(lines: Sequence[dict[str, Any]]) -> str:
    """The cases in Markdown, a table for each device: of the newest commit that has measured anything there."""
    results = [line for line in lines if line["benchmark"] == "gpu" and line.get("device")]
    newest = {line["device"]: line["commit"] for line in results if "seconds_per_step" in line}
    if not newest:
        return _rows({})
    parts = []
    for device, code in newest.items():
        # A case that was passed over at first, and measured later, has two lines.
        found = {line["case"]: line for line in results if (line["device"], line["commit"]) == (device, code)}
        rate = next(line["matmul_tflops"] for line in found.values())
        parts.append(f"{device}, commit {code}; MFU of {rate:.0f} TFLOP/s, its own rate in matrix products:\n")
        parts.append(_rows(found))
        if all("seconds_per_step" in found.get(name, {}) for name in (OURS, SEED)):
            shares = [found[SEED][key] / found[OURS][key] for key in ("seconds_per_step", "peak_gib")]
            parts.append("The seed's way takes {:.1f} times the seconds and {:.1f} times the memory.\n".format(*shares))
    return "\n".join(parts)


def _rows(found: dict[str, dict[str, Any]]) -> str:
    rows = [HEAD, ("---",) * len(HEAD)]
    for case in CASES:
        line = found.get(case.name, {})
        if "seconds_per_step" not in line:
            why = line.get("error") or line.get("skipped")
            rows.append((case.about, f"not measured: {why}" if why else "not measured yet", *[""] * (len(HEAD) - 2)))
            continue
        of_memory = [line.get(key) for key in ("peak_gib", "planned_gib")]
        figures = [f"{line['seconds_per_step']:.3f}", f"{line['samples_per_second']:.2f}", f"{line['mfu']:.1%}"]
        rows.append((case.about, *figures, *("" if gib is None else f"{gib:.1f}" for gib in of_memory)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of it all; what is left goes on another time")
    parser.add_argument("--out", type=Path, help=f"where lines are appended; of a GPU {OUT.relative_to(ROOT)}")
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU too")
    parser.add_argument("--table", action="store_true", help="print the results in Markdown, and measure nothing")
    options = parser.parse_args()
    out = options.out or (None if options.tiny else OUT)
    if options.table:
        print(render_table(read_lines(options.out or OUT)), end="")
        return 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            return Measurement(Path(folder), out, minutes=options.minutes, tiny=options.tiny).run(CASES)
        except Failed as error:
            print(f"the device itself cannot be used: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
