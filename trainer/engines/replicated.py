"""The engines whose every process holds a copy of the model: one process, and DDP."""

import logging
from collections.abc import Iterator
from typing import final

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs.schema import Config
from trainer.engines.base import BuildOptimizer, TorchEngine
from trainer.engines.slices import REPLICATED, LocalSlice, assign_owners, flat_moments, trained, trained_parameters

log = logging.getLogger("fluxfill")


class ReplicatedEngine(TorchEngine):
    """Weights and optimizer state are copies, alike on every rank; each rank writes a share of them."""

    @property
    @final
    def rank0_has_full_model(self) -> bool:
        return True

    @property
    @final
    def state_layout(self) -> str:
        return REPLICATED

    def init_optimizer_state(self) -> None:
        for parameter in trained(self._transformer):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._set_learning_rate(0.0)
        self._apply_gradients()
        self._zero_gradients()

    def local_slices(self) -> list[LocalSlice]:
        named = trained_parameters(self.unwrap())
        owners = assign_owners(list(self.trained_sizes.values()), self.world_size)
        slices = []
        for (name, parameter), owner in zip(named.items(), owners, strict=True):
            weight = parameter.detach().view(-1)
            moments = flat_moments(self._optimizer.state[parameter], parameter)
            slices.append(LocalSlice(name, 0, parameter.numel(), weight, moments, of=name, owned=owner == self.rank))
        return slices

    def optimizer_states(self) -> list[tuple[str, Tensor, dict]]:
        named = trained_parameters(self.unwrap())
        return [(name, parameter, self._optimizer.state[parameter]) for name, parameter in named.items()]

    def sync_after_load(self) -> None:
        """The slices are the model's own weights: nothing to do."""

    def _gather_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in trained_parameters(self.unwrap()).items():
            yield name, parameter.detach()


class SingleEngine(ReplicatedEngine):
    """One process."""

    def _start_accelerator(self, config: Config) -> Accelerator:
        return Accelerator(cpu=not torch.cuda.is_available())

    def _prepare(self, transformer: nn.Module, build_optimizer: BuildOptimizer) -> nn.Module:
        self._transformer = self._on_device(transformer)
        self._optimizer = build_optimizer(trained(self._transformer))
        return self._transformer

    def unwrap(self) -> nn.Module:
        return self._transformer

    def _sync_gradients(self, wanted: bool) -> None:
        """There is nobody to exchange them with."""


class DdpEngine(ReplicatedEngine):
    """DistributedDataParallel: gradients are averaged over the ranks during the last backward pass of a step."""

    def _start_accelerator(self, config: Config) -> Accelerator:
        handlers = [
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=self.patience),
        ]
        return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=handlers)

    def _prepare(self, transformer: nn.Module, build_optimizer: BuildOptimizer) -> nn.Module:
        model = self._accelerator.prepare_model(self._on_device(transformer))
        if not isinstance(model, DistributedDataParallel):
            raise RuntimeError(f"engine {self.name}: accelerate made {type(model).__name__} of the transformer")
        if all(parameter.requires_grad for parameter in model.parameters()):  # an adapter's are small
            _lay_gradients_in_buckets(model)
        # Constants (scales of a quantized base), alike everywhere since DDP was made: it would send them at each step.
        model.broadcast_buffers = False
        self._transformer = model
        self._optimizer = build_optimizer(trained(model))
        return model

    def unwrap(self) -> nn.Module:
        return self._transformer.module

    def close(self) -> None:
        # Were the reducer the last that holds the process group, it would wait, with Python's lock in its hands, for
        # gloo's threads, which may want it to let go of what was sent last. The group's own end lets them have it.
        if isinstance(model := getattr(self, "_transformer", None), DistributedDataParallel):
            for name in (
                "logger",
                "reducer",
            ):  # where a version of torch has them: a run that is done must not fail here
                vars(model).pop(name, None)
        super().close()

    def _sync_gradients(self, wanted: bool) -> None:
        self._transformer.require_backward_grad_sync = wanted

    def _zero_gradients(self) -> None:
        # They stay where they are, in DDP's buckets: micro-steps that exchange nothing would make others beside those.
        self._transformer.zero_grad(set_to_none=False)


def _lay_gradients_in_buckets(model: DistributedDataParallel) -> None:
    """Make every gradient, of 0, the view of DDP's bucket that it otherwise becomes in the first exchange: full
    gradients beside the buckets are 44 GiB of FLUX.1. By exchanges without a forward pass; after the first of them DDP
    rebuilds its buckets.

    Calls private parts of torch. Where a version has them no more, the gradients come to lie there later.
    """
    rebuild = getattr(model.reducer, "_rebuild_buckets", None)
    if rebuild is None or not hasattr(model.reducer, "prepare_for_backward"):
        log.warning("torch %s has another DDP: gradients take twice the memory in the first step", torch.__version__)
        return
    for _ in range(2):
        model.zero_grad()
        rebuild()
        model.reducer.prepare_for_backward([])
        torch.stack([parameter.flatten()[0].float() * 0 for parameter in trained(model)]).sum().backward()
    model.zero_grad(set_to_none=False)
