"""What a process of benchmarks/gpu.py does: runs of the trainer itself on random weights and made-up latents, timed
from outside, and single steps whose gradients are compared between devices."""

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.gpu_card import GIB
from benchmarks.gpu_inputs import FLUX, TINY, Sizes, random_weights, write_cache, write_model
from configs.fit import Cluster, Work
from configs.gpu_profiles import profile_of_card
from configs.loading import load_config
from configs.memory import CONTEXT
from configs.schema import Config
from data.batches.training_set import TrainingSet
from trainer import fit, main, method
from trainer.engines.base import Engine, Update
from trainer.model.attention import in_force as attention_order
from trainer.run_log import RunLog
from trainer.training_data import largest_bucket

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "fill_lora.yaml"
MOST_SAMPLES = 16  # in a cache; a larger global batch takes some twice


class _Enough(Exception):
    """A run has taken all the steps that it was started for."""


class Clock:
    """Times the steps of a run, from behind the warm-up on.  warm_up: steps.  least, seconds: that are timed."""

    def __init__(self, *, warm_up: int, least: int, seconds: float) -> None:
        self._warm_up, self._least, self._seconds = warm_up, least, seconds
        self._created, self._begin = time.perf_counter(), 0.0
        self._steps = 0
        self.found: dict[str, Any] = {}

    def step(self, loss: float) -> None:
        """A step has ended. Raises _Enough when there are enough."""
        self._steps += 1
        if self._steps == 1:
            self.found |= {"first_loss": loss, "seconds_to_first_step": round(_now() - self._created, 2)}
        if self._steps == self._warm_up:
            self._begin = _now()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        timed = self._steps - self._warm_up
        if timed >= self._least and time.perf_counter() - self._begin >= self._seconds:
            self.found |= {"steps": timed, "seconds_per_step": (_now() - self._begin) / timed}
            if torch.cuda.is_available():
                free, total = torch.cuda.mem_get_info()
                self.found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
                self.found["device_used_gib"] = round((total - free) / GIB, 2)  # with CUDA's context, and the gaps
            raise _Enough


def _now() -> float:
    """Once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def prepare(sizes: Sizes, settings: Sequence[str], folder: Path, *, side: int, samples: int) -> list[str]:
    """A run's whole list of key=value, over configs/fill_lora.yaml; its model folder and cache are written once."""
    model, cache = folder / f"model-{sizes.name}", folder / f"cache-{sizes.name}-{side}"
    given = [
        *(f"run.dir={folder}/runs", f"model.base={model}", f"data.cache={cache}", "data.holdout=0"),
        *(f"data.resolution={sizes.sides[side]}", f"data.captions.text_length={sizes.text}", "train.warmup_steps=0"),
        *("method={type: lora, rank: 16, alpha: 16}", "train.optimizer=adamw", "train.steps=100000"),
        *(f"train.global_batch_size={samples}", "train.micro_batch_size=1", "validation.every_steps=null"),
        *("checkpoint.every_steps=null", "checkpoint.at_end=false", "logging.trackers=[]", "parallel.engine=single"),
        *settings,
    ]
    if not model.exists():
        write_model(model, sizes.shape)
    if not cache.exists():
        write_cache(load_config(RECIPE, given), model, sizes.shape, side=sizes.sides[side], samples=MOST_SAMPLES)
    return given


@contextmanager
def _patched(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    """(owner, name, what stands there inside) of each; and on a CPU what compiles does the least that it can. A run's
    order of attention kernels ends with it: the seed's way, in the same process, has torch's own."""
    with ExitStack() as stack:
        stack.callback(attention_order.close)
        for owner, name, new in patches:
            stack.enter_context(mock.patch.object(owner, name, new))
        if not torch.cuda.is_available():
            stack.enter_context(mock.patch.object(torch, "compile", partial(torch.compile, backend="eager")))
        yield


@contextmanager
def _observed(clock: Clock, weights_on: torch.device) -> Iterator[dict[str, Any]]:
    """A run inside it has random weights and a clock; yields what was decided at its start."""
    chosen: dict[str, Any] = {}
    fit_to_memory, checkpoint = main.fit_to_memory, fit.checkpoint_blocks

    def fit_and_tell(config: Config, engine: Engine, model: Path, samples: TrainingSet, **named: Any) -> int:
        micro = fit_to_memory(config, engine, model, samples, **named)
        chosen["micro_batch_size"] = min(micro, config.train.global_batch_size)
        chosen["tokens"] = largest_bucket(samples).tokens + samples.manifest.text_length
        return micro

    def checkpoint_and_tell(transformer: Any, count: int) -> None:
        chosen["checkpointed"] = count
        checkpoint(transformer, count)

    def step(log: RunLog, state: Any, update: Update, *rest: Any) -> None:
        clock.step(update.loss)

    with _patched(
        (method, "load_transformer", random_weights(weights_on)),
        (main, "fit_to_memory", fit_and_tell),
        (fit, "checkpoint_blocks", checkpoint_and_tell),
        (RunLog, "step", step),
    ):
        yield chosen


def measure(name: str, side: int, samples: int, settings: Sequence[str], *, tiny: bool, folder: Path) -> dict[str, Any]:
    """Seconds of a step, memory at its fullest moment and what a plan says of it, of a run by the trainer itself."""
    sizes = TINY if tiny else FLUX
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = prepare(sizes, [*settings, f"run.name={name}"], folder, side=side, samples=samples)
    least, seconds = (1, 0.0) if tiny else (3, 6.0)
    clock = Clock(warm_up=1 if tiny else 3, least=least, seconds=seconds)
    with _observed(clock, device) as chosen, suppress(_Enough):
        main.train(["--config", str(RECIPE), "--resume", "never", *given])
    work = _work(load_config(RECIPE, given), sizes, chosen["tokens"])
    one = work.cost(1, 0)
    parts = work.memory(chosen["micro_batch_size"], chosen["checkpointed"])
    planned = sum(part.bytes for part in parts if part.what != CONTEXT.what)  # which no allocator sees
    return {
        **chosen,
        **clock.found,
        **rates(clock.found, samples, (one.matmul_flops + one.attention_flops) / 1e12),
        "planned_gib": round(planned / GIB, 2),
    }


def _work(config: Config, sizes: Sizes, tokens: int) -> Work:
    """As a plan reckons it; neither memory nor arithmetic hangs on which card it is."""
    return Work(config, sizes.shape, "single", Cluster(profile_of_card("", 80.0), 1, 1), tokens)


def rates(found: dict[str, Any], samples: int, tflop: float) -> dict[str, Any]:
    """tflop: of a sample's forward and backward pass, nothing computed twice, which is what MFU counts."""
    per_second = samples / found["seconds_per_step"]
    return {
        "seconds_per_step": round(found["seconds_per_step"], 5),
        "samples_per_step": samples,
        "samples_per_second": round(per_second, 4),
        "tflop_per_sample": round(tflop, 6),
        "tflop_per_second": round(tflop * per_second, 4),
    }


def measure_seed(name: str, side: int, samples: int, *, tiny: bool, folder: Path) -> dict[str, Any]:
    """The same of the seed's own way (gpu_seed.py), with the same model, picture and adapter."""
    from benchmarks.gpu_seed import SeedTrainer

    sizes = TINY if tiny else FLUX
    config = load_config(RECIPE, prepare(sizes, [f"run.name={name}"], folder, side=side, samples=samples))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    least, seconds = (1, 0.0) if tiny else (3, 6.0)
    clock = Clock(warm_up=1 if tiny else 2, least=least, seconds=seconds)
    transformer = random_weights(device)(Path(config.model.base), dtype=torch.bfloat16)
    trainer = SeedTrainer(transformer, config, device, side=sizes.sides[side], small=tiny)
    with suppress(_Enough):
        while True:
            for _ in range(samples - 1):
                trainer.backward()
            clock.step(trainer.step())
    one = _work(config, sizes, trainer.tokens).cost(1, 0)
    return clock.found | rates(clock.found, samples, (one.matmul_flops + one.attention_flops) / 1e12)


def parity(kind: str, settings: Sequence[str], *, folder: Path) -> Path:
    """Gradients of one step of a small model, as this process's device computes them, and its loss, in a file.

    Weights, samples and noise are the same on every device.
    """
    found: dict[str, Tensor] = {}

    def keep(optimizer: Any, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients = {str(number): weight.grad for number, weight in enumerate(weights) if weight.grad is not None}
        found.update({name: gradient.float().cpu() for name, gradient in gradients.items()})

    def step(log: RunLog, state: Any, update: Update, *rest: Any) -> None:
        found["loss"] = torch.tensor(update.loss)
        raise _Enough

    def half(uniform: Tensor, *_: Any) -> Tensor:
        return torch.full_like(uniform, 0.5, dtype=torch.float32)

    # The model embeds a thousand times sigma and guidance, by sines that turn with the last bit of a bf16: these two
    # are the same in all dtypes.
    same = [*settings, "flow.guidance=32", f"run.name=parity-{kind}"]
    given = prepare(TINY, same, folder, side=256, samples=2)
    watch = register_optimizer_step_pre_hook(keep)
    load = random_weights(torch.device("cpu"))
    try:
        with _patched(
            (method, "load_transformer", load),
            (main, "sample_sigma", half),
            (RunLog, "step", step),
        ):
            main.train(["--config", str(RECIPE), "--resume", "never", *given])
    except _Enough:
        pass
    finally:
        watch.remove()
    save_file(found, folder / f"parity-{kind}.safetensors")
    return folder / f"parity-{kind}.safetensors"


def distances(found: Path, expected: Path) -> dict[str, float]:
    """How far two devices are apart, as shares of what is expected: their loss, and of the gradients of single tensors
    the furthest and the median. Those that are 0, as of an adapter's first half, do not count."""
    ours, theirs = load_file(found), load_file(expected)
    if ours.keys() != theirs.keys():
        raise ValueError("they have not the same tensors")
    loss = abs(ours.pop("loss").item() / theirs.pop("loss").item() - 1)
    shares = [
        ((ours[name] - gradient).norm() / gradient.norm()).item() for name, gradient in theirs.items() if gradient.any()
    ]
    furthest = torch.tensor(shares).max().item()  # nan if any of them is
    return {"loss": loss, "furthest": furthest, "median": statistics.median(shares)}


def left_gib() -> float:
    """What is still allocated on the device after a run, which the next one would find there."""
    torch._dynamo.reset()
    gc.collect()
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / GIB
