"""The engines that shard parameters, gradients and optimizer state by FSDP2; DTensors stay in this file.

A DTensor's `item()`, `float()`, `sum()`, `norm()` give a rank's own part of the number: `full_tensor()` comes first.
"""

import os
from collections.abc import Iterator
from typing import final

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from configs.combinations import QUANTIZED
from configs.errors import InputError
from configs.schema import Config
from trainer.engines.base import BuildOptimizer, TorchEngine, compute_dtype
from trainer.engines.slices import LocalSlice, flat_moments, sliced_layout, trained, trained_parameters


class FsdpEngine(TorchEngine):
    """Sharded over all ranks; the engine file says whether shards rest in host memory (fsdp2-offload)."""

    def __init__(self, config: Config, name: str) -> None:
        self._trains_adapter = config.method.type != "full"
        super().__init__(config, name)

    @final
    def _start_accelerator(self, config: Config) -> Accelerator:
        parallelism = self._plan_mesh()
        cpu = not torch.cuda.is_available()
        # Before the Accelerator, which on a CPU would take each process for the only one. It makes the group, too.
        PartialState(cpu=cpu, timeout=self.patience)
        dtype = compute_dtype(config, PartialState().device)
        plugin = FullyShardedDataParallelPlugin(  # the rest comes from the engine file
            fsdp_version=2,
            # An adapter is gathered in fp32, small as it is: a DoRA's magnitudes would lose their changes in bf16.
            mixed_precision_policy=mixed_precision(torch.float32 if self._trains_adapter else dtype),
            # A quantized base is on every rank already when it is cut.
            cpu_ram_efficient_loading=config.model.precision not in QUANTIZED,
        )
        if cpu:
            return _start_accelerator_on_cpu(plugin, parallelism)
        return Accelerator(fsdp_plugin=plugin, parallelism_config=parallelism)

    def _plan_mesh(self) -> ParallelismConfig | None:
        """How many ranks share one copy; None: all of them."""
        return None

    @property
    @final
    def rank0_has_full_model(self) -> bool:
        return False

    @final
    def _prepare(self, transformer: nn.Module, build_optimizer: BuildOptimizer) -> nn.Module:
        self._transformer = _shard(self._accelerator, transformer)
        unsharded = [name for name, p in self._transformer.named_parameters() if not isinstance(p, DTensor)]
        if unsharded:
            raise RuntimeError(
                f"engine {self.name}: {len(unsharded)} parameters are not sharded, {unsharded[0]} among them"
            )
        # bitsandbytes has no kernels for DTensors. An optimizer that works element by element needs none: it is given
        # the shards themselves, which share their memory with the DTensors.
        self._shards = {p: nn.Parameter(p.to_local().detach()) for p in trained(self._transformer)}
        self._optimizer = build_optimizer([shard for shard in self._shards.values() if shard.numel()])
        mesh = next(iter(self._shards)).device_mesh
        for group in self._optimizer.param_groups:  # for stochastic rounding: alike in copies, not in other shards
            group["shard"] = mesh.get_local_rank(mesh.ndim - 1)
        # Kept from now on: after a forward pass without a backward (validation) the model's root is unsharded.
        self._named = trained_parameters(self._transformer)
        return self._transformer

    @final
    def unwrap(self) -> nn.Module:
        return self._transformer

    # --- a step ------------------------------------------------------------------------------------------------------

    def _sync_gradients(self, wanted: bool) -> None:
        if self._trains_adapter:
            self._transformer.set_requires_gradient_sync(wanted)
        else:
            # Kept until the last micro-batch, gradients would be unsharded and in fp32 on every rank: 44 GiB of FLUX.1.
            # They are scattered each time; only the sum over hsdp's copies, of shards, can wait.
            self._transformer.set_requires_all_reduce(wanted)

    def _clip_gradients(self) -> Tensor:
        norm = super()._clip_gradients()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _apply_gradients(self) -> None:
        for parameter, shard in self._shards.items():
            shard.grad = parameter.grad.to_local()
        self._step_shards()

    def _step_shards(self) -> None:
        self._optimizer.step()
        for shard in self._shards.values():
            shard.grad = None

    # --- the state ---------------------------------------------------------------------------------------------------

    def init_optimizer_state(self) -> None:
        for shard in self._shards.values():  # not by the model, whose root may be unsharded
            shard.grad = torch.zeros_like(shard)
        self._set_learning_rate(0.0)
        self._step_shards()

    def local_slices(self) -> list[LocalSlice]:
        slices = []
        for name, parameter in self._named.items():
            local = parameter.to_local().detach()
            mesh = parameter.device_mesh
            shard_dim = mesh.ndim - 1  # hsdp: (replicate, shard)
            rows = -(-parameter.shape[0] // mesh.size(shard_dim))  # as torch.chunk deals dimension 0
            row = parameter.numel() // parameter.shape[0]
            start = min(rows * mesh.get_local_rank(shard_dim), parameter.shape[0]) * row
            moments = flat_moments(self._optimizer.state.get(self._shards[parameter], {}), local)
            owned = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
            slices.append(LocalSlice(name, start, parameter.numel(), local.view(-1), moments, of=name, owned=owned))
        return slices

    def optimizer_states(self) -> list[tuple[str, Tensor, dict]]:
        shards = {name: self._shards[parameter] for name, parameter in self._named.items()}
        return [(name, shard, self._optimizer.state[shard]) for name, shard in shards.items() if shard.numel()]

    @property
    def state_layout(self) -> str:
        return sliced_layout(self.name, self.world_size)

    def sync_after_load(self) -> None:
        # After a forward pass without a backward (a self-check, a validation) the root and the model's end are
        # unsharded, and the next pass would not gather what their shards hold now.
        for module in self._transformer.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _gather_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named.items():
            yield name, parameter.detach().full_tensor()


class HsdpEngine(FsdpEngine):
    """Sharded within a node, copied across nodes."""

    def _plan_mesh(self) -> ParallelismConfig:
        world_size = int(os.environ["WORLD_SIZE"])
        node_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        if world_size == node_size or node_size < 2:
            raise InputError(
                f"engine hsdp shards within a node and copies across nodes, but there are {world_size} processes, "
                f"{node_size} on this node. Start it on two nodes or more with two GPUs or more each, or use fsdp2."
            )
        return ParallelismConfig(dp_replicate_size=world_size // node_size, dp_shard_size=node_size)


def mixed_precision(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """FSDP's policy: parameters are gathered in the compute dtype, gradients summed in fp32. Inputs are not cast by it:
    rotary tables stay in fp32."""
    if dtype == torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _start_accelerator_on_cpu(
    plugin: FullyShardedDataParallelPlugin, parallelism: ParallelismConfig | None
) -> Accelerator:
    """FSDP on a CPU, which accelerate does not know: it would make DDP of it and say nothing.

    Writes to private parts of accelerate's state.
    """
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # there is no memory to pin it for
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    PartialState._shared_state["fsdp_plugin"] = plugin
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, parallelism_config=parallelism)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def _shard(accelerator: Accelerator, transformer: nn.Module) -> nn.Module:
    """The model with every parameter a DTensor, by a private part of accelerate.

    Not accelerator.prepare: it maps an optimizer's old parameters to the sharded ones by their addresses, which an
    optimizer built afterwards does not need.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, transformer)
