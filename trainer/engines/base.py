"""The abstract engine: processes, sharding, gradients, the optimizer's step, and where a rank's state lies.

An engine is an accelerate config file (configs/engines/) that `accelerate launch` turns into environment variables.
Accelerate falls back without a word when something is missing (FSDP on a CPU becomes DDP, or N runs of one process), so
what was started is compared with what was asked for (start.py), and what `prepare` made with what it should have made.
"""

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from configs.schema import Config
from data.batches.micro_batch import MicroBatch
from trainer.engines.ranks import Ranks, wait_for_ranks
from trainer.engines.slices import LocalSlice, trained, trained_parameters
from trainer.engines.step_profile import StepProfile
from trainer.model.check_quantized import check_against_reference, reference_layers
from trainer.model.compute_dtype import compute_in
from trainer.process.stop_signals import stop_signal
from trainer.process.watchdog import beat

BuildOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Update:
    """What one optimizer update did, alike on every rank.

    loss: mean over the global batch.  grad_norm: before clipping.  applied: False if either was not finite, or the loss
    above its limit; then no weight, moment or count of the optimizer changed.  stop: a rank has been told to stop, so
    all do after this update.
    """

    loss: float
    grad_norm: float
    applied: bool
    stop: bool = False


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of forward passes, by model.precision; auto: bf16 on a GPU, fp32 on a CPU. Over weights that are
    quantized, or trained in bf16, always bf16."""
    precision = config.model.precision
    if precision == "auto":
        in_bf16 = device.type == "cuda" or config.train.weights == "bf16_stochastic"
        precision = "bf16" if in_bf16 else "fp32"
    return torch.float32 if precision == "fp32" else torch.bfloat16


class Engine(ABC):
    """The ranks of a run and the model on them. All ranks call its methods together.

    A subclass says what is abstract here; what is final is alike in all of them.
    """

    # How long ranks wait for one of them that reads or writes tens of GiB; NCCL's own is 10 minutes. (A rank that fails
    # is heard long before: trainer/process/failed_ranks.py.)
    patience: ClassVar = timedelta(minutes=30)

    _transformer: Any  # as the engine made it: DistributedDataParallel, an FSDPModule, a DeepSpeedEngine
    _optimizer: torch.optim.Optimizer

    def __init__(self, config: Config, name: str) -> None:
        self.name = name
        self._accelerator = self._start_accelerator(config)
        self.rank = self._accelerator.process_index
        self.world_size = self._accelerator.num_processes
        self.local_rank = self._accelerator.local_process_index
        self.device = self._accelerator.device
        self.ranks = Ranks(self.rank, self.world_size, self.device)
        self.profile = StepProfile(config, self.rank)
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size != started:
            raise RuntimeError(
                f"{started} processes were started, accelerate sees {self.world_size}: they would not train one model"
            )
        self.compute_dtype = compute_dtype(config, self.device)
        self._max_grad_norm = config.train.max_grad_norm
        self._global_batch_size = config.train.global_batch_size
        self._loss = torch.zeros((), device=self.device)
        self._forward_begins: Any = None
        self._forwards: list[tuple[Any, Any]] = []  # when each forward pass since they were asked for began and ended
        self._losses: list[Tensor] = []  # [B] of each micro-batch since the last update

    @abstractmethod
    def _start_accelerator(self, config: Config) -> Accelerator:
        """Join the process group. Raises InputError for a number of processes that the engine cannot work with."""

    @property
    @final
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    @final
    def num_nodes(self) -> int:
        return self.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    @cached_property
    def gpus(self) -> list[str]:
        """The kinds of GPU of the run's ranks, by name; none: CPUs. All ranks ask for it together, the first time."""
        own = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        return sorted({name for name in self.ranks.all_gather(own) if name is not None})

    def close(self) -> None:
        """Leave the process group."""
        self._accelerator.end_training()

    # --- the model ---------------------------------------------------------------------------------------------------

    @final
    def prepare(self, transformer: nn.Module, build_optimizer: BuildOptimizer) -> nn.Module:
        """Spread the model over the ranks and build the optimizer of what this rank holds.

        transformer: on rank 0 with its weights, elsewhere on the meta device; they are handed out here.  Asserts that
        the outcome is what the engine promises, and that a quantized base came through unharmed.
        """
        compute_in(transformer, self.compute_dtype)
        references = reference_layers(transformer)
        self.ranks.barrier()  # wait for rank 0's reading here: groups that `_prepare` makes have not our patience yet
        prepared = self._prepare(transformer, build_optimizer)
        wait_for_ranks(self.patience)
        if references:
            check_against_reference(prepared, self.unwrap(), references, self.device)
        return prepared

    @abstractmethod
    def _prepare(self, transformer: nn.Module, build_optimizer: BuildOptimizer) -> nn.Module:
        """The model that computes, with `_transformer` and `_optimizer` set."""

    @final
    def _on_device(self, transformer: nn.Module) -> nn.Module:
        """The model on this rank's device; without weights it gets memory, whose values rank 0 sends."""
        if transformer.device.type == "meta":
            return transformer.to_empty(device=self.device)
        return transformer.to(self.device)

    @abstractmethod
    def unwrap(self) -> nn.Module:
        """The FluxTransformer2DModel in the prepared model, for sampling and saving."""

    @property
    @abstractmethod
    def rank0_has_full_model(self) -> bool:
        """Whether rank 0 has every weight, and can run the model alone."""

    @final
    def told_to_stop(self) -> bool:
        """Whether any rank has been told to stop; all ranks call it."""
        return self.ranks.all_reduce_sum(stop_signal() is not None) > 0

    # --- a step ------------------------------------------------------------------------------------------------------

    @final
    def micro_steps(self, micro_batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches on the device. Gradients are synchronized in the backward pass of the last one only."""
        self._losses.clear()
        self.profile.begin()
        for rows in micro_batches:
            beat("step")
            self._sync_gradients(rows.is_last)
            moved = rows.to(self.device)
            self._forward_begins = self._now()
            yield moved

    @abstractmethod
    def _sync_gradients(self, wanted: bool) -> None:
        """Whether the next backward pass ends with the exchange of gradients between ranks."""

    @final
    def backward(self, losses: Tensor, weight: Tensor) -> None:
        """Add a micro-batch to the gradient of sum(real rows) / global batch size.

        losses: [B] per sample.  weight: [B], 1 for a real row, 0 for a padding row.
        """
        if self._forward_begins is not None:
            self._forwards.append((self._forward_begins, self._now()))
        loss = (losses * weight).sum() / self._global_batch_size
        self._loss += loss.detach()
        self._losses.append(losses.detach())
        # Every engine averages gradients over the ranks, where the sum is wanted.
        self._backward(loss * self.world_size)

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    @final
    def forward_seconds(self) -> float:
        """How long this rank's forward passes took since it was asked last; after a step, as its end was waited for.
        Where the model is sharded, ranks wait for each other inside."""
        passes = self._forwards.copy()
        self._forwards.clear()
        if self.device.type == "cuda":
            return sum(begin.elapsed_time(end) for begin, end in passes) / 1000
        return sum(end - begin for begin, end in passes)

    @final
    def _now(self) -> Any:
        """This moment, as the device comes to it."""
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @final
    def own_losses(self) -> list[float]:
        """Losses of this rank's rows of the last global batch, in order, those of padding rows behind them. Waits for
        the device."""
        return torch.cat(self._losses).tolist()

    @final
    def step(self, lr: float, loss_limit: float = math.inf) -> Update:
        """Clip and apply the gradients at learning rate `lr`, unless on any rank loss or gradient is not finite, or the
        loss of all is above the limit."""
        self._set_learning_rate(lr)
        update = self._step(loss_limit)
        self._loss.zero_()
        return update

    @final
    def drop_gradients(self) -> None:
        """Forget the backward passes since the last step: for what was not to be trained on."""
        self._loss.zero_()
        self._zero_gradients()

    @abstractmethod
    def _zero_gradients(self) -> None: ...

    @abstractmethod
    def _step(self, loss_limit: float) -> Update: ...

    @final
    def _tell_all(self, *numbers: Tensor) -> Tensor:
        """[2 or more]: the loss of all ranks, how many of them have been told to stop, and the sums of the numbers. One
        message: all ranks find the same, and what one has been told reaches all at the same update."""
        stop = self._loss.new_full((), stop_signal() is not None)
        told = torch.stack([self._loss, stop, *numbers])
        self.ranks.all_reduce_sum_(told)
        return told

    @final
    def _set_learning_rate(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    # --- the state ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def init_optimizer_state(self) -> None:
        """Make the optimizer's state exist before its first step, so that a checkpoint can be loaded into it: one step
        at rate 0 on gradients of 0, which changes no weight."""

    @abstractmethod
    def local_slices(self) -> list[LocalSlice]:
        """Every part of a trained parameter that lies on this rank, with its optimizer state."""

    @property
    def trained_sizes(self) -> dict[str, int]:
        """Trained parameter -> number of its elements, over all ranks."""
        return {name: parameter.numel() for name, parameter in trained_parameters(self.unwrap()).items()}

    @abstractmethod
    def optimizer_states(self) -> list[tuple[str, Tensor, dict]]:
        """(name, the tensor it belongs to, state) of everything the optimizer keeps state of on this rank."""

    @property
    @abstractmethod
    def state_layout(self) -> str:
        """Engines of one layout can exchange optimizer state that cannot be cut by element, as 8-bit moments are."""

    @abstractmethod
    def sync_after_load(self) -> None:
        """Make the model agree with its fp32 state after the views of `local_slices` were written to."""

    @final
    @torch.no_grad()
    def iter_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 tensor on the CPU) of every trained parameter, in full, one by one; on rank 0, nothing elsewhere.

        All ranks must go through it to its end: parts of a parameter come from all of them.  A tensor is a copy: an
        average may stand in the parameter's place a moment later.
        """
        for name, full in self._gather_weights():
            if self.is_main:  # the copy waits for the gathering
                yield name, torch.empty(full.shape).copy_(full)
            elif self.device.type == "cuda":
                # One gathering at a time. All at once, the clock of the last would run while rank 0 writes those before
                # it: an export of 24 GB may take longer than ranks have patience.
                torch.cuda.current_stream(self.device).synchronize()

    @abstractmethod
    def _gather_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor on the device) of every trained parameter, in full. All ranks go through it to its end."""

    @final
    def full_weights(self) -> dict[str, Tensor]:
        """All of `iter_full_weights` at once: of an adapter. All ranks call it."""
        return dict(self.iter_full_weights())


class TorchEngine(Engine):
    """Backward pass, clipping and step by torch itself: every engine but DeepSpeed's."""

    @final
    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    @final
    def _step(self, loss_limit: float) -> Update:
        norm = self._clip_gradients().to(self._loss)
        # norm - norm: 0, or nan if it is not finite here; a rank must not go on alone where only another finds that.
        told = self._tell_all(norm - norm)
        # One wait for the device per update: whether the weights may change hangs on these numbers.
        loss, stops, difference, grad_norm = torch.stack([*told, norm]).tolist()
        applied = math.isfinite(loss) and loss <= loss_limit and difference == 0
        if applied:
            self._apply_gradients()
        self._zero_gradients()
        return Update(loss, grad_norm, applied, stop=stops > 0)

    def _clip_gradients(self) -> Tensor:
        """Scale the gradients of all ranks together down to train.max_grad_norm; returns their norm before it."""
        return torch.nn.utils.clip_grad_norm_(trained(self._transformer), self._max_grad_norm or float("inf"))

    def _apply_gradients(self) -> None:
        self._optimizer.step()

    def _zero_gradients(self) -> None:
        self._transformer.zero_grad()
