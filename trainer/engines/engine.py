"""What differs between engines: processes, sharding, gradients, the optimizer's step, and where a rank's state lies.

An engine is an accelerate config file (configs/engines/) that `accelerate launch` turns into environment variables.
Accelerate falls back without a word when something is missing (FSDP on a CPU becomes DDP, or N runs of one process), so
what was started is compared with what was asked for, and what `prepare` made with what it should have made.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ParallelismConfig,
)
from torch import Tensor, nn
from torch.distributed import all_gather_object, all_reduce, broadcast, broadcast_object_list, gather_object
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from configs.combinations import check_engine
from configs.errors import InputError
from configs.schema import Config
from data.batches.micro_batch import MicroBatch
from trainer.engines.build_lock import clear_stale_build_locks
from trainer.model.check_quantized import check_against_reference, reference_layers
from trainer.model.quantize import QUANTIZED
from trainer.process.stop_signals import stop_signal

log = logging.getLogger("fluxfill")

REPLICATED = "whole tensors"

# How long ranks wait for one of them that reads or writes tens of GiB; NCCL's own is 10 minutes. (A rank that fails is
# heard long before: trainer/process/failed_ranks.py.)
PATIENCE = timedelta(minutes=30)

# Elements of one tensor that bitsandbytes' optimizers cannot count any more.
EIGHT_BIT_LIMIT = 2**31

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


@dataclass(frozen=True)
class LocalSlice:
    """The part of one trained parameter whose state lies on this rank.

    name: the parameter.  start: of the part, in the flattened parameter.  numel: of the whole parameter.
    weight: [n], fp32, or bf16 by train.weights; a view: writing to it changes the weight the optimizer works on (then
    call `engine.loaded`).  moments: the optimizer's state of the same elements, in the same dtype, views too.
    of, at: the tensor among `engine.optimizer_states` that holds the part, and where in it the part begins.  owned:
    this rank writes it to checkpoints (the other ranks that hold the same part do not).
    """

    name: str
    start: int
    numel: int
    weight: Tensor
    moments: dict[str, Tensor]
    of: str
    at: int = 0
    owned: bool = True


def trained(transformer: nn.Module) -> list[Any]:
    """The parameters that train, in the model's order."""
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def trained_parameters(transformer: nn.Module) -> dict[str, Any]:
    """Name -> parameter of everything that trains; Any, as each engine makes something of its own of a parameter."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def launched_engine(environment: Mapping[str, str]) -> str:
    """The engine that `accelerate launch` was told to start, from the variables it sets."""
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        offload = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") == "cpu"
        return f"zero{stage}" + ("-offload" if offload else "")
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true":
            return "hsdp"
        return "fsdp2-offload" if environment.get("FSDP_OFFLOAD_PARAMS") == "true" else "fsdp2"
    return "ddp" if int(environment.get("WORLD_SIZE", "1")) > 1 else "single"


def start_engine(config: Config) -> "Engine":
    """Join the processes of the run under the engine they were launched with.

    Raises InputError if the config asks for another engine, or for something that this one cannot do.
    """
    name = launched_engine(os.environ)
    asked = config.parallel.engine
    if asked not in ("auto", name):
        raise InputError(
            f"parallel.engine is {asked}, but this process was started as {name}. Start it by `fluxfill train`, or "
            f"`accelerate launch --config_file configs/engines/{asked}.yaml ...`, or set parallel.engine={name}."
        )
    check_engine(config, name)
    if name.startswith("zero"):
        return ZeroEngine(config, name)
    if name.startswith(("fsdp2", "hsdp")):
        return FsdpEngine(config, name)
    return Engine(config, name)


class Engine:
    """One process, or a copy of the model in each (ddp).

    All ranks must call its methods together. The other engines override what they do otherwise.
    """

    _transformer: Any  # as the engine made it: DistributedDataParallel, an FSDPModule, a DeepSpeedEngine
    _optimizer: torch.optim.Optimizer

    def __init__(self, config: Config, name: str) -> None:
        self.name = name
        self._accelerator = self._start_accelerator(config)
        self.rank = self._accelerator.process_index
        self.world_size = self._accelerator.num_processes
        self.local_rank = self._accelerator.local_process_index
        self.device = self._accelerator.device
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size != started:
            raise RuntimeError(
                f"{started} processes were started, accelerate sees {self.world_size}: they would not train one model"
            )
        self.compute_dtype = compute_dtype(config, self.device)
        self._max_grad_norm = config.train.max_grad_norm
        self._global_batch_size = config.train.global_batch_size
        self._loss = torch.zeros((), device=self.device)

    def _start_accelerator(self, config: Config) -> Accelerator:
        handlers = [
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ]
        return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=handlers)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        return self.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    # --- the model ---------------------------------------------------------------------------------------------------

    @property
    def rank0_has_full_model(self) -> bool:
        """Whether rank 0 has every weight, and can run the model alone."""
        return True

    def prepare(self, transformer: nn.Module, build_optimizer: BuildOptimizer) -> nn.Module:
        """Spread the model over the ranks and build the optimizer of what this rank holds.

        transformer: on rank 0 with its weights, elsewhere on the meta device; they are handed out here.  Asserts that
        the outcome is what the engine promises, and that a quantized base came through unharmed.
        """
        twins = reference_layers(transformer)
        prepared = self._prepare(transformer, build_optimizer)
        if twins:
            check_against_reference(prepared, self.plain_transformer, twins, self.device, self.autocast)
        return prepared

    def _prepare(self, transformer: nn.Module, build_optimizer: BuildOptimizer) -> nn.Module:
        transformer = self._on_device(transformer)
        if self.name == "ddp":
            transformer = self._accelerator.prepare_model(transformer)
            if not isinstance(transformer, DistributedDataParallel):
                raise RuntimeError(f"engine ddp: accelerate made {type(transformer).__name__} of the transformer")
            if all(parameter.requires_grad for parameter in transformer.parameters()):  # an adapter's are small
                _lay_gradients_in_buckets(transformer)
        self._transformer = transformer
        self._optimizer = build_optimizer(trained(transformer))
        return transformer

    def _on_device(self, transformer: nn.Module) -> nn.Module:
        """The model on this rank's device; without weights it gets memory, whose values rank 0 sends."""
        if transformer.device.type == "meta":
            return transformer.to_empty(device=self.device)
        return transformer.to(self.device)

    def plain(self, transformer: nn.Module) -> nn.Module:
        """The FluxTransformer2DModel itself, for sampling and saving."""
        return transformer.module if isinstance(transformer, DistributedDataParallel) else transformer

    def autocast(self) -> AbstractContextManager:
        """The arithmetic of forward passes: bf16 with fp32 weights kept, or plain fp32."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    # --- a step ------------------------------------------------------------------------------------------------------

    def micro_steps(self, micro_batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches on the device. Gradients are exchanged in the backward pass of the last one only."""
        for rows in micro_batches:
            self._exchange_gradients(rows.is_last)
            yield rows.to(self.device)

    def _exchange_gradients(self, wanted: bool) -> None:
        if isinstance(self._transformer, DistributedDataParallel):
            self._transformer.require_backward_grad_sync = wanted

    def backward(self, losses: Tensor, weight: Tensor) -> None:
        """Add a micro-batch to the gradient of sum(real rows) / global batch size.

        losses: [B] per sample.  weight: [B], 1 for a sample, 0 for a padding row.
        """
        loss = (losses * weight).sum() / self._global_batch_size
        self._loss += loss.detach()
        # Every engine averages gradients over the ranks, where the sum is wanted.
        self._backward(loss * self.world_size)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> Update:
        """Clip and apply the gradients at learning rate `lr`, unless loss or gradient is not finite on any rank."""
        # One message for both: what each rank has been told reaches all of them at the same update.
        told = torch.stack([self._loss, self._loss.new_full((), stop_signal() is not None)])
        if self.world_size > 1:
            all_reduce(told)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        update = self._step(told)
        self._loss.zero_()
        return update

    def _step(self, told: Tensor) -> Update:
        """told: [2], the loss of all ranks, and how many of them have been told to stop."""
        norm = torch.nn.utils.clip_grad_norm_(trained(self._transformer), self._max_grad_norm or float("inf"))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # One wait for the device per update: whether the weights may change hangs on these numbers.
        loss, stops, grad_norm = torch.stack([*told, norm.to(told)]).tolist()
        applied = abs(loss) + abs(grad_norm) < float("inf")
        if applied:
            self._apply_gradients()
        self._zero_gradients()
        return Update(loss, grad_norm, applied, stop=stops > 0)

    def _apply_gradients(self) -> None:
        self._optimizer.step()

    def _zero_gradients(self) -> None:
        # Under ddp they stay where they are, in its buckets: micro-steps that exchange nothing would make others there.
        self._transformer.zero_grad(set_to_none=self.name != "ddp")

    @property
    def plain_transformer(self) -> nn.Module:
        """The prepared model itself."""
        return self.plain(self._transformer)

    # --- the state ---------------------------------------------------------------------------------------------------

    def init_optimizer_state(self) -> None:
        """Make the optimizer's state exist before its first step, so that a checkpoint can be loaded into it: one step
        at rate 0 on gradients of 0, which changes no weight."""
        for parameter in trained(self._transformer):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        self._apply_gradients()
        self._zero_gradients()

    def local_slices(self) -> list[LocalSlice]:
        """Every part of a trained parameter that lies on this rank, with its optimizer state."""
        slices = []
        owners = _spread([p.numel() for p in trained(self._transformer)], self.world_size)
        for (name, parameter), owner in zip(trained_parameters(self.plain_transformer).items(), owners, strict=True):
            moments = {
                key: moment.view(-1) for key, moment in elementwise_state(self._optimizer.state[parameter], parameter)
            }
            weight = parameter.detach().view(-1)
            slices.append(LocalSlice(name, 0, parameter.numel(), weight, moments, of=name, owned=owner == self.rank))
        return slices

    @property
    def trained_sizes(self) -> dict[str, int]:
        """Trained parameter -> number of its elements, over all ranks."""
        return {name: parameter.numel() for name, parameter in trained_parameters(self.plain_transformer).items()}

    def optimizer_states(self) -> list[tuple[str, Tensor, dict]]:
        """(name, the tensor it belongs to, state) of everything the optimizer keeps state of on this rank."""
        named = trained_parameters(self.plain_transformer)
        return [(name, parameter, self._optimizer.state[parameter]) for name, parameter in named.items()]

    @property
    def state_layout(self) -> str:
        """Engines of one layout can exchange optimizer state that cannot be cut by element, as 8-bit moments are."""
        return REPLICATED

    def loaded(self) -> None:
        """Make the model agree with its fp32 state after the views of `local_slices` were written to."""

    @torch.no_grad()
    def iter_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 tensor on the CPU) of every trained parameter, whole, one by one; on rank 0, nothing elsewhere.

        All ranks must go through it to its end: parts of a parameter come from all of them.
        """
        # Copies, also where fp32 weights lie on the CPU already: an average may stand in their place a moment later.
        for name, parameter in trained_parameters(self.plain_transformer).items() if self.is_main else ():
            yield name, torch.empty(parameter.shape).copy_(parameter.detach())

    def full_weights(self) -> dict[str, Tensor]:
        """All of `iter_full_weights` at once: of an adapter. All ranks call it."""
        return dict(self.iter_full_weights())

    # --- the ranks ---------------------------------------------------------------------------------------------------

    def gather(self, item: object) -> list:
        """Every rank's item, in rank order, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list = [None] * self.world_size
        all_gather_object(items, item)
        return items

    def gather_to_main(self, item: object) -> list | None:
        """Every rank's item, in rank order, on rank 0; None elsewhere. For what is large: the others need no room."""
        if self.world_size == 1:
            return [item]
        items: list | None = [None] * self.world_size if self.is_main else None
        gather_object(item, items)
        return items

    def share(self, item: Any) -> Any:
        """Rank 0's item on every rank."""
        items = [item]
        if self.world_size > 1:
            broadcast_object_list(items, device=self.device)
        return items[0]

    def sum(self, value: float) -> float:
        """The sum of every rank's number, on every rank."""
        if self.world_size == 1:
            return float(value)
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        all_reduce(total)
        return total.item()

    def from_main(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor on every rank's device. Elsewhere `tensor` tells shape and dtype and may be on meta."""
        if self.is_main:
            value = tensor.detach().to(self.device).contiguous()
        else:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        if self.world_size > 1:
            broadcast(value, src=0)
        return value

    def wait(self) -> None:
        """Return when every rank has come here."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group."""
        self._accelerator.end_training()


class FsdpEngine(Engine):
    """FSDP2: parameters, gradients and optimizer state sharded over all ranks; hsdp: within a node, copied across."""

    def _start_accelerator(self, config: Config) -> Accelerator:
        cpu = not torch.cuda.is_available()
        self._trains_adapter = config.method.type != "full"
        # First: on a CPU accelerate would take each process for the only one. It makes the group, too.
        PartialState(cpu=cpu, timeout=PATIENCE)
        dtype = compute_dtype(config, PartialState().device)
        plugin = FullyShardedDataParallelPlugin(  # the rest comes from the engine file
            fsdp_version=2,
            # An adapter is gathered in fp32, small as it is: a DoRA's lengths would lose their changes in bf16.
            mixed_precision_policy=_fsdp_precision(torch.float32 if self._trains_adapter else dtype),
            # A quantized base is on every rank already when it is cut.
            cpu_ram_efficient_loading=config.model.precision not in QUANTIZED,
        )
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy) and cpu:
            plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # there is no memory to pin it for
        parallelism = None
        if self.name == "hsdp":
            world_size = int(os.environ["WORLD_SIZE"])
            node_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
            if world_size == node_size or node_size < 2:
                raise InputError(
                    f"engine hsdp shards within a node and copies across nodes, but there are {world_size} processes, "
                    f"{node_size} on this node. Start it on two nodes or more with two GPUs or more each, or use fsdp2."
                )
            parallelism = ParallelismConfig(dp_replicate_size=world_size // node_size, dp_shard_size=node_size)
        if cpu:
            # Accelerate has no FSDP on a CPU: it would make DDP of it and say nothing.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            PartialState._shared_state["fsdp_plugin"] = plugin
        accelerator = Accelerator(cpu=cpu, fsdp_plugin=plugin, parallelism_config=parallelism)
        if cpu:
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin
        return accelerator

    @property
    def rank0_has_full_model(self) -> bool:
        return False

    def _prepare(self, transformer: nn.Module, build_optimizer: BuildOptimizer) -> nn.Module:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        # Not accelerator.prepare: it maps an optimizer's old parameters to the sharded ones by their addresses, which
        # an optimizer built afterwards does not need.
        self._transformer = fsdp2_prepare_model(self._accelerator, transformer)
        whole = [name for name, p in self._transformer.named_parameters() if not isinstance(p, DTensor)]
        if whole:
            raise RuntimeError(f"engine {self.name}: {len(whole)} parameters are not sharded, {whole[0]} among them")
        # bitsandbytes has no kernels for DTensors. An optimizer that works element by element needs none: it is given
        # the shards themselves, which share their memory with the DTensors.
        self._shards = {p: nn.Parameter(p.to_local().detach()) for p in trained(self._transformer)}
        self._optimizer = build_optimizer([shard for shard in self._shards.values() if shard.numel()])
        mesh = next(iter(self._shards)).device_mesh
        for group in self._optimizer.param_groups:  # of what is rounded at random: alike in copies, not in other shards
            group["shard"] = mesh.get_local_rank(mesh.ndim - 1)
        # Kept from now on: after a forward pass without a backward (validation) the model holds its root whole.
        self._named = trained_parameters(self._transformer)
        return self._transformer

    def _apply_gradients(self) -> None:
        for parameter, shard in self._shards.items():
            shard.grad = parameter.grad.to_local()
        self._step_shards()

    def _step_shards(self) -> None:
        self._optimizer.step()
        for shard in self._shards.values():
            shard.grad = None

    def init_optimizer_state(self) -> None:
        for shard in self._shards.values():  # the model may hold its root whole
            shard.grad = torch.zeros_like(shard)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        self._step_shards()

    def loaded(self) -> None:
        # After a forward pass without a backward (a self-check, a validation) the root and the model's end are held
        # whole, and the next pass would not gather what their shards hold now.
        for module in self._transformer.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _exchange_gradients(self, wanted: bool) -> None:
        if self._trains_adapter:
            self._transformer.set_requires_gradient_sync(wanted)
        else:
            # Kept until the last micro-batch, gradients would be whole and in fp32 on every rank: 44 GiB of FLUX.1.
            # They are scattered each time; only the sum over hsdp's copies, of shards, can wait.
            self._transformer.set_requires_all_reduce(wanted)

    def local_slices(self) -> list[LocalSlice]:
        slices = []
        for name, parameter in self._named.items():
            local = parameter.to_local().detach()
            mesh = parameter.device_mesh
            shard_dim = mesh.ndim - 1  # hsdp: (replicate, shard)
            rows = -(-parameter.shape[0] // mesh.size(shard_dim))  # as torch.chunk deals dimension 0
            row = parameter.numel() // parameter.shape[0]
            start = min(rows * mesh.get_local_rank(shard_dim), parameter.shape[0]) * row
            state = self._optimizer.state.get(self._shards[parameter], {})
            moments = {key: moment.view(-1) for key, moment in elementwise_state(state, local)}
            owned = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
            slices.append(LocalSlice(name, start, parameter.numel(), local.view(-1), moments, of=name, owned=owned))
        return slices

    def optimizer_states(self) -> list[tuple[str, Tensor, dict]]:
        shards = {name: self._shards[parameter] for name, parameter in self._named.items()}
        return [(name, shard, self._optimizer.state[shard]) for name, shard in shards.items() if shard.numel()]

    @property
    def state_layout(self) -> str:
        return f"slices of {self.name} on {self.world_size} processes"

    @torch.no_grad()
    def iter_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named.items():
            whole = parameter.detach().full_tensor()
            if self.is_main:  # the copy waits for the gathering and leaves a plain tensor
                yield name, torch.empty(whole.shape).copy_(whole)


class ZeroEngine(Engine):
    """DeepSpeed ZeRO: optimizer state (1), gradients (2) and parameters (3) partitioned over the ranks.

    accelerate's own wrapper steps the optimizer inside `backward`, before any check could stop it; here the DeepSpeed
    engine's accumulation boundary is set by hand.
    """

    def _start_accelerator(self, config: Config) -> Accelerator:
        cpu = not torch.cuda.is_available()
        if cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        try:
            import deepspeed  # noqa: F401
            from accelerate.utils import DeepSpeedPlugin
        except ImportError as error:
            raise InputError(f"engine {self.name} needs deepspeed ({error}). Install it, or use fsdp2.") from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        clear_stale_build_locks()  # on a CPU DeepSpeed compiles its communication at first start
        bf16 = compute_dtype(config, torch.device("cpu" if cpu else "cuda")) == torch.bfloat16
        self._stage = int(self.name[4])
        self._eight_bit = config.train.optimizer == "adamw8bit"
        plugin = DeepSpeedPlugin()  # stage and offload come from the engine file
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only reports with it; batches are ours
            "gradient_accumulation_steps": 1,  # likewise: the boundary is set by hand
            "gradient_clipping": config.train.max_grad_norm or 0.0,
            "bf16": {"enabled": bf16},
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if self._stage > 1:  # else the sum over micro-batches is kept in bf16; at stage 1 it would be another optimizer
            plugin.deepspeed_config["data_types"] = {"grad_accum_dtype": "fp32"}
        plugin.deepspeed_config["zero_optimization"] |= {"overlap_comm": not cpu, "contiguous_gradients": True}
        handlers = [InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=PATIENCE)]
        # Not with cpu=True: accelerate would make DDP of it and say nothing.
        return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=handlers)

    def _prepare(self, transformer: nn.Module, build_optimizer: BuildOptimizer) -> nn.Module:
        import deepspeed

        if self._accelerator.distributed_type is not DistributedType.DEEPSPEED:
            raise RuntimeError(f"engine {self.name}: accelerate started {self._accelerator.distributed_type} instead")
        if self._eight_bit and self._stage < 3:  # stage 3 cuts it into tensors of 1e9 elements
            check_eight_bit_partition(sum(p.numel() for p in trained(transformer)), self.world_size, self.name)
        if self.compute_dtype == torch.bfloat16:
            # As DeepSpeed will; but not with all of the model in fp32 on the GPU first.
            for parameter in transformer.parameters():
                if parameter.dtype == torch.float32:
                    parameter.data = parameter.data.bfloat16()
        transformer = self._on_device(transformer)
        if self.compute_dtype == torch.bfloat16:
            # DeepSpeed switches off an autocast that is on around it, but asks for CUDA's alone. So one inside too.
            inside = torch.autocast(self.device.type, dtype=torch.bfloat16)
            transformer.forward = inside(transformer.forward)
        engine, optimizer = self._accelerator.prepare(transformer, build_optimizer(trained(transformer)))
        if not isinstance(engine, deepspeed.DeepSpeedEngine) or engine.zero_optimization_stage() != self._stage:
            raise RuntimeError(f"engine {self.name}: accelerate made {type(engine).__name__} of the transformer")
        self._transformer = engine
        self._optimizer = optimizer
        return engine

    def plain(self, transformer: Any) -> nn.Module:
        return transformer.module

    @property
    def rank0_has_full_model(self) -> bool:
        return self._stage < 3

    def _exchange_gradients(self, wanted: bool) -> None:
        self._transformer.set_gradient_accumulation_boundary(wanted)

    def _backward(self, loss: Tensor) -> None:
        self._transformer.backward(loss)

    def _step(self, told: Tensor) -> Update:
        self._transformer.step()  # clips, skips if a gradient of any rank is not finite, applies, gathers
        norm = self._transformer.get_global_grad_norm()
        applied = self._transformer.was_step_applied()
        loss, stops = told.tolist()
        return Update(loss, float(norm) if norm is not None else float("nan"), applied, stop=stops > 0)

    def _partitions(self) -> list[Tensor]:
        """This rank's flat fp32 weights, one tensor per group: what the inner optimizer steps."""
        zero = self._transformer.optimizer
        return zero.single_partition_of_fp32_groups if self._stage < 3 else zero.fp32_partitioned_groups_flat

    def init_optimizer_state(self) -> None:
        zero = self._transformer.optimizer
        for group in zero.optimizer.param_groups:
            group["lr"] = 0.0
        # With an optimizer in host memory the gradients there were allocated once: DeepSpeed copies into them later.
        host_gradients = [flat.grad for flat in self._partitions()]
        for number, flat in enumerate(self._partitions()):
            flat.grad = torch.zeros_like(flat)
            if self._stage == 3:
                zero._optimizer_step(number)  # the inner optimizer knows a group's tensor only while it steps it
        if self._stage < 3:
            zero.optimizer.step()
        for flat, gradient in zip(self._partitions(), host_gradients, strict=True):
            flat.grad = gradient

    def local_slices(self) -> list[LocalSlice]:
        parameters = trained_parameters(self._transformer.module)
        return [part for name, parameter in parameters.items() for part in self._slices_of(name, parameter)]

    def _slices_of(self, name: str, parameter: Any) -> Iterator[LocalSlice]:
        """The part of a parameter in this rank's partition; none if its elements lie in other ranks' alone."""
        zero = self._transformer.optimizer
        if self._stage < 3:
            if (place := parameter._hp_mapping) is None:
                return
            numel, first = parameter.numel(), place.lp_fragment_address.start
            group, offset, count = place.param_group_index, *_span(place.hp_fragment_address)
        else:
            numel = parameter.ds_numel
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            first = size * self.rank
            count = max(0, min(size, numel - first))  # the last partitions are padded
        flat = self._partitions()[group]
        moments = elementwise_state(zero.optimizer.state.get(flat, {}), flat)
        yield LocalSlice(
            name,
            first,
            numel,
            flat.detach().narrow(0, offset, count),
            {key: moment.narrow(0, offset, count) for key, moment in moments},
            of=_partition_name(group),
            at=offset,
        )

    @property
    def trained_sizes(self) -> dict[str, int]:
        named = trained_parameters(self.plain_transformer)
        return {name: getattr(parameter, "ds_numel", parameter.numel()) for name, parameter in named.items()}

    def optimizer_states(self) -> list[tuple[str, Tensor, dict]]:
        states = self._transformer.optimizer.optimizer.state
        return [(_partition_name(number), flat, states[flat]) for number, flat in enumerate(self._partitions())]

    @property
    def state_layout(self) -> str:
        return f"slices of {self.name} on {self.world_size} processes"

    def loaded(self) -> None:
        zero = self._transformer.optimizer
        if self._stage < 3:
            zero.update_lp_params()
            return
        for parameter in trained(self._transformer.module):
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            parameter.ds_tensor.data.copy_(self._partitions()[group].narrow(0, offset, size))

    @torch.no_grad()
    def iter_full_weights(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in trained_parameters(self._transformer.module).items():
            whole = safe_get_full_fp32_param(parameter)
            if self.is_main:
                yield name, whole.detach().float().cpu()


def check_eight_bit_partition(num_trained: int, world_size: int, engine: str) -> None:
    """Raise InputError if the part of the weights that ZeRO 1 or 2 keeps as one tensor on each rank is too long for
    bitsandbytes, whose kernels count elements in 32 bits: it would wrap around in silence."""
    length = -(-num_trained // world_size)
    if length >= EIGHT_BIT_LIMIT:
        fewest = num_trained // (EIGHT_BIT_LIMIT - 1) + 1
        raise InputError(
            f"train.optimizer is adamw8bit, but engine {engine} on {world_size} process(es) has it step "
            f"{length:,} elements as one tensor, and bitsandbytes takes less than {EIGHT_BIT_LIMIT:,}. Use fsdp2 or "
            f"zero3 (parallel.engine), or {fewest} processes or more."
        )


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """What model.precision computes in; auto: bf16 on a GPU, fp32 on a CPU. Over weights that are quantized, or trained
    in bf16, always bf16."""
    precision = config.model.precision
    if precision == "auto":
        in_bf16 = device.type == "cuda" or config.train.weights == "bf16_stochastic"
        precision = "bf16" if in_bf16 else "fp32"
    return torch.float32 if precision == "fp32" else torch.bfloat16


def _fsdp_precision(dtype: torch.dtype):
    """Parameters are gathered in the compute dtype, gradients summed in fp32. Inputs are not cast: autocast does that
    where it is safe, and rotary tables stay in fp32."""
    if dtype == torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _lay_gradients_in_buckets(model: DistributedDataParallel) -> None:
    """Make every gradient, of 0, the view of DDP's bucket that it otherwise becomes in the first exchange: whole
    gradients beside the buckets are 44 GiB of FLUX.1. By exchanges without a forward pass; after the first of them DDP
    lays its buckets out anew."""
    for _ in range(2):
        model.zero_grad()
        model.reducer._rebuild_buckets()
        model.reducer.prepare_for_backward([])
        torch.stack([parameter.flatten()[0].float() * 0 for parameter in trained(model)]).sum().backward()
    model.zero_grad(set_to_none=False)


def _spread(sizes: list[int], parts: int) -> list[int]:
    """For each of the sizes, in order, the part that it falls to, so that the parts are about equal."""
    total, before, owners = max(1, sum(sizes)), 0, []
    for size in sizes:
        owners.append(min(parts - 1, (before + size // 2) * parts // total))
        before += size
    return owners


def _partition_name(number: int) -> str:
    return f"partition {number}"


def _span(address) -> tuple[int, int]:
    """(start, length) of a DeepSpeed fragment address."""
    return address.start, address.numel


def elementwise_state(state: Mapping[str, object], weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The optimizer state that can be cut and moved with its weight: one float per element."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == weight.shape and value.ndim:
            yield key, value
