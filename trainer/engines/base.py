"""The abstract engine: processes, sharding, gradients, the optimizer's step, and where a rank's state lies.

An engine is an accelerate config file (configs/engines/) that `accelerate launch` turns into environment variables.
Accelerate falls back without a word when something is missing (FSDP on a CPU becomes DDP, or N runs of one process), so
what was started is compared with what was asked for (start.py), and what `prepare` made with what it should have made.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from configs.schema import Config
from data.batches.micro_batch import MicroBatch
from trainer.engines.ranks import Ranks
from trainer.engines.slices import LocalSlice, trained, trained_parameters
from trainer.model.check_quantized import check_against_reference, reference_layers
from trainer.process.stop_signals import stop_signal

BuildOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Update:
    """What one optimizer update did, alike on every rank.

    loss: mean over the global batch.  grad_norm: before clipping.  applied: False if either was not finite; then no
    weight changed.  stop: a rank has been told to stop, so all do after this update.
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
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size != started:
            raise RuntimeError(
                f"{started} processes were started, accelerate sees {self.world_size}: they would not train one model"
            )
        self.compute_dtype = compute_dtype(config, self.device)
        self._max_grad_norm = config.train.max_grad_norm
        self._global_batch_size = config.train.global_batch_size
        self._loss = torch.zeros((), device=self.device)

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

    @final
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
        references = reference_layers(transformer)
        prepared = self._prepare(transformer, build_optimizer)
        if references:
            check_against_reference(prepared, self.unwrap(), references, self.device, self.autocast)
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
    def autocast(self) -> AbstractContextManager:
        """The arithmetic of forward passes: bf16 with fp32 weights kept, or plain fp32."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    # --- a step ------------------------------------------------------------------------------------------------------

    @final
    def micro_steps(self, micro_batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches on the device. Gradients are synchronized in the backward pass of the last one only."""
        for rows in micro_batches:
            self._sync_gradients(rows.is_last)
            yield rows.to(self.device)

    @abstractmethod
    def _sync_gradients(self, wanted: bool) -> None:
        """Whether the next backward pass ends with the exchange of gradients between ranks."""

    @final
    def backward(self, losses: Tensor, weight: Tensor) -> None:
        """Add a micro-batch to the gradient of sum(real rows) / global batch size.

        losses: [B] per sample.  weight: [B], 1 for a real row, 0 for a padding row.
        """
        loss = (losses * weight).sum() / self._global_batch_size
        self._loss += loss.detach()
        # Every engine averages gradients over the ranks, where the sum is wanted.
        self._backward(loss * self.world_size)

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    @final
    def step(self, lr: float) -> Update:
        """Clip and apply the gradients at learning rate `lr`, unless loss or gradient is not finite on any rank."""
        # One message for both: what each rank has been told reaches all of them at the same update.
        told = torch.stack([self._loss, self._loss.new_full((), stop_signal() is not None)])
        self.ranks.all_reduce_sum_(told)
        self._set_learning_rate(lr)
        update = self._step(told)
        self._loss.zero_()
        return update

    @abstractmethod
    def _step(self, told: Tensor) -> Update:
        """told: [2], the loss of all ranks, and how many of them have been told to stop."""

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

    @abstractmethod
    def iter_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 tensor on the CPU) of every trained parameter, in full, one by one; on rank 0, nothing elsewhere.

        All ranks must go through it to its end: parts of a parameter come from all of them.
        """

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
    def _step(self, told: Tensor) -> Update:
        norm = self._clip_gradients()
        # One wait for the device per update: whether the weights may change hangs on these numbers.
        loss, stops, grad_norm = torch.stack([*told, norm.to(told)]).tolist()
        applied = abs(loss) + abs(grad_norm) < float("inf")
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
