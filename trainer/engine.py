"""What differs between engines: processes, gradients, the optimizer's step.

Every engine is an accelerate config file (configs/engines/). Accelerate falls back without a word when something is
missing, so what was started is compared with what was asked for.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.distributed import all_gather_object, all_reduce
from torch.nn.parallel import DistributedDataParallel

from configs.errors import InputError
from configs.schema import Config
from data.reader import MicroBatch

log = logging.getLogger("fluxfill")

_ENGINE_OF = {
    DistributedType.MULTI_GPU: "ddp",
    DistributedType.MULTI_CPU: "ddp",
}


@dataclass(frozen=True)
class Update:
    """What one optimizer update did, alike on every rank.

    loss: mean over the global batch.  grad_norm: before clipping.  applied: False if either was not finite; then no
    weight changed.
    """

    loss: float
    grad_norm: float
    applied: bool


def trained(transformer: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, in the model's order."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


class Engine:
    """The processes of a run and their common step. All methods must be called by all ranks."""

    def __init__(self, config: Config) -> None:
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.rank = self._accelerator.process_index
        self.world_size = self._accelerator.num_processes
        self.device = self._accelerator.device
        kind = self._accelerator.distributed_type
        self.name = "single" if self.world_size == 1 else _ENGINE_OF.get(kind, str(kind))
        asked = config.parallel.engine
        if asked != "auto" and asked != self.name:
            raise InputError(
                f"parallel.engine is {asked}, but this process was started as {self.name} with {self.world_size} "
                f"process(es). Start it with `accelerate launch --config_file configs/engines/{asked}.yaml ...`, or set "
                f"parallel.engine={self.name}."
            )
        precision = config.model.precision
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" else "fp32"
        self.compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._max_grad_norm = config.train.max_grad_norm
        self._global_batch_size = config.train.global_batch_size
        self._loss = torch.zeros((), device=self.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def prepare(
        self, transformer: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Move model and optimizer under the engine; asserts that the result is what the engine promises."""
        if self.world_size == 1:
            # One process started by the elastic launcher is MULTI_GPU to accelerate, and would get DDP's copies for
            # nobody to talk to.
            transformer, optimizer = transformer.to(self.device), self._accelerator.prepare_optimizer(optimizer)
        else:
            transformer, optimizer = self._accelerator.prepare(transformer, optimizer)
        if isinstance(transformer, DistributedDataParallel) != (self.name == "ddp"):
            raise RuntimeError(f"engine {self.name}: accelerate made {type(transformer).__name__} of the transformer")
        self._transformer = transformer
        self._parameters = trained(transformer)
        return transformer, optimizer

    def autocast(self) -> AbstractContextManager:
        """The arithmetic of forward passes: bf16 with fp32 weights kept, or plain fp32."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def micro_steps(self, micro_batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches on the device. Gradients are exchanged in the backward pass of the last one only."""
        for rows in micro_batches:
            if isinstance(self._transformer, DistributedDataParallel):
                self._transformer.require_backward_grad_sync = rows.is_last
            yield rows.to(self.device)

    def backward(self, losses: Tensor, weight: Tensor) -> None:
        """Add a micro-batch to the gradient of sum(real rows) / global batch size.

        losses: [B] per sample.  weight: [B], 1 for a real row, 0 for one that fills up.
        """
        loss = (losses * weight).sum() / self._global_batch_size
        self._loss += loss.detach()
        # DDP averages over ranks where the sum is wanted.
        self._accelerator.backward(loss * self.world_size)

    def step(self, optimizer: torch.optim.Optimizer, lr: float) -> Update:
        """Clip and apply the gradients at learning rate `lr`, unless loss or gradient is not finite on any rank."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm or float("inf"))
        if self.world_size > 1:
            all_reduce(self._loss)
        # One wait for the device per update: whether the weights may change hangs on these two numbers.
        loss, grad_norm = torch.stack([self._loss, norm.to(self._loss.dtype)]).tolist()
        applied = abs(loss) + abs(grad_norm) < float("inf")
        if applied:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._loss.zero_()
        return Update(loss, grad_norm, applied)

    def plain(self, transformer: nn.Module) -> nn.Module:
        """The plain model, for sampling and saving."""
        return transformer.module if isinstance(transformer, DistributedDataParallel) else transformer

    def gather(self, item: object) -> list:
        """Every rank's item, in rank order, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list = [None] * self.world_size
        all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Return when every rank has come here."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group."""
        self._accelerator.end_training()
