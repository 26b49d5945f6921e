"""The engines that partition by DeepSpeed ZeRO: optimizer state (1), gradients (2) and parameters (3).

accelerate's own wrapper steps the optimizer inside `backward`, before any check could stop it; here the DeepSpeed
engine's accumulation boundary is set by hand.
"""

import logging
import math
import os
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, final

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from configs.communication import reduces_to_owners
from configs.errors import InputError
from configs.memory import ZERO3_LIVE, ZERO_BUCKET
from configs.schema import Config
from trainer.engines.base import BuildOptimizer, Engine, Update, compute_dtype
from trainer.engines.build_lock import watched_build_locks
from trainer.engines.slices import LocalSlice, sliced_layout, trained, trained_parameters
from trainer.optimizers.state import elementwise_state

# Elements of one tensor that bitsandbytes' optimizers cannot count any more.
EIGHT_BIT_LIMIT = 2**31


class Fragment(NamedTuple):
    """The part of a parameter in this rank's partitions.

    group: number of the partition.  offset: of the part in it.  start: of the part in the flattened parameter.
    numel: of the part; 0 if all its elements lie in other ranks'.
    """

    group: int
    offset: int
    start: int
    numel: int


class ZeroEngine(Engine):
    """A stage of ZeRO: on each rank, flat fp32 weights and the state of the optimizer that steps them."""

    stage: ClassVar[int]
    _norm_method: ClassVar = "scaled_global_norm"  # of DeepSpeed's optimizer: the gradients' norm, of all ranks

    def __init__(self, config: Config, name: str) -> None:
        self._eight_bit = config.train.optimizer == "adamw8bit"
        super().__init__(config, name)

    @final
    @watched_build_locks()
    def _start_accelerator(self, config: Config) -> Accelerator:
        cpu = not torch.cuda.is_available()
        if cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        try:
            import deepspeed.ops
            from accelerate.utils import DeepSpeedPlugin
        except ImportError as error:
            raise InputError(f"engine {self.name} needs deepspeed ({error}). Install it, or use fsdp2.") from error
        if cpu:  # it would compile, for a minute at the first start, sums that only inference asks for
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        bf16 = compute_dtype(config, torch.device("cpu" if cpu else "cuda")) == torch.bfloat16
        plugin = DeepSpeedPlugin()  # stage and offload come from the engine file
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only reports with it; batches are ours
            "gradient_accumulation_steps": 1,  # likewise: the boundary is set by hand
            "gradient_clipping": config.train.max_grad_norm or 0.0,  # left out, it would clip at 1.0
            "bf16": {"enabled": bf16},
            "communication_data_type": "fp32",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if self.stage > 1:  # else the sum over micro-batches is kept in bf16; at stage 1 it would be another optimizer
            plugin.deepspeed_config["data_types"] = {"grad_accum_dtype": "fp32"}
        plugin.deepspeed_config["zero_optimization"] |= {
            "overlap_comm": not cpu,
            "contiguous_gradients": True,
            "reduce_bucket_size": ZERO_BUCKET,
            "stage3_max_live_parameters": ZERO3_LIVE,
            "stage3_max_reuse_distance": ZERO3_LIVE,
        }
        handlers = [InitProcessGroupKwargs(backend="gloo" if cpu else "nccl", timeout=self.patience)]
        # Not with cpu=True: accelerate would make DDP of it and say nothing.
        return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=handlers)

    @final
    def _prepare(self, transformer: nn.Module, build_optimizer: BuildOptimizer) -> nn.Module:
        import deepspeed

        if self._accelerator.distributed_type is not DistributedType.DEEPSPEED:
            raise RuntimeError(f"engine {self.name}: accelerate started {self._accelerator.distributed_type} instead")
        num_trained = sum(parameter.numel() for parameter in trained(transformer))
        if self._eight_bit and self.stage < 3:  # stage 3 cuts it into tensors of 1e9 elements
            check_eight_bit_partition(num_trained, self.world_size, self.name)
        settings = self._accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        settings["use_multi_rank_bucket_allreduce"] = not reduces_to_owners(num_trained, self.world_size)
        if self.compute_dtype == torch.bfloat16:
            # As DeepSpeed will; but not with all of the model in fp32 on the GPU first.
            for parameter in transformer.parameters():
                if parameter.dtype == torch.float32:
                    parameter.data = parameter.data.bfloat16()
        transformer = self._on_device(transformer)
        with watched_build_locks():
            engine, optimizer = self._accelerator.prepare(transformer, build_optimizer(trained(transformer)))
        if not isinstance(engine, deepspeed.DeepSpeedEngine) or engine.zero_optimization_stage() != self.stage:
            raise RuntimeError(f"engine {self.name}: accelerate made {type(engine).__name__} of the transformer")
        self._transformer = engine
        self._optimizer = optimizer
        return engine

    @final
    def unwrap(self) -> nn.Module:
        return self._transformer.module

    # --- a step ------------------------------------------------------------------------------------------------------

    @final
    def _sync_gradients(self, wanted: bool) -> None:
        self._transformer.set_gradient_accumulation_boundary(wanted)

    @final
    def _backward(self, loss: Tensor) -> None:
        self._transformer.backward(loss)

    @final
    def _zero_gradients(self) -> None:
        """Those of weight 0 that were not yet exchanged need no clearing: what is added to them is what counts."""

    @final
    def _step(self, loss_limit: float) -> Update:
        loss, stops = self._tell_all().tolist()
        if math.isfinite(loss) and loss <= loss_limit:
            self._transformer.step()  # clips, skips if a gradient of any rank is not finite, applies, gathers
        else:
            self._skip()
        norm = self._transformer.get_global_grad_norm()
        applied = self._transformer.was_step_applied()
        return Update(loss, float(norm) if norm is not None else math.nan, applied, stop=stops > 0)

    @final
    def _skip(self) -> None:
        """Have DeepSpeed skip the update, whatever the gradients are, and clean up after it in its own way: it is told
        that their norm is infinite. Replaces a private part of its optimizer for the time. Raises RuntimeError where a
        version of DeepSpeed applies the update all the same."""
        infinite = self._loss.new_full((), math.inf)
        setattr(self._zero, self._norm_method, lambda: [infinite] if self.stage == 3 else infinite)
        try:
            self._transformer.step()
        finally:
            delattr(self._zero, self._norm_method)
        if self._transformer.was_step_applied():
            raise RuntimeError(f"engine {self.name}: DeepSpeed applied an update that had to be skipped")

    # --- the state ---------------------------------------------------------------------------------------------------

    @property
    @final
    def _zero(self) -> Any:
        """DeepSpeed's ZeRO optimizer, around the optimizer that steps the partitions."""
        return self._transformer.optimizer

    @abstractmethod
    def _partitions(self) -> list[Tensor]:
        """This rank's flat fp32 weights, one tensor per group: what the inner optimizer steps."""

    @abstractmethod
    def _fragment_of(self, parameter: Any) -> Fragment | None:
        """The parameter's part of them; None if all of it lies in other ranks'."""

    @abstractmethod
    def _step_partitions(self) -> None:
        """Step the inner optimizer on the gradients of the partitions."""

    @final
    def init_optimizer_state(self) -> None:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = 0.0
        # With an optimizer in host memory the gradients there were allocated once: DeepSpeed copies into them later.
        host_gradients = [flat.grad for flat in self._partitions()]
        for flat in self._partitions():
            flat.grad = torch.zeros_like(flat)
        self._step_partitions()
        for flat, gradient in zip(self._partitions(), host_gradients, strict=True):
            flat.grad = gradient

    @final
    def local_slices(self) -> list[LocalSlice]:
        sizes, states = self.trained_sizes, self._zero.optimizer.state
        slices = []
        for name, parameter in trained_parameters(self.unwrap()).items():
            if (place := self._fragment_of(parameter)) is None:
                continue
            flat = self._partitions()[place.group]
            moments = elementwise_state(states.get(flat, {}), flat)
            slices.append(
                LocalSlice(
                    name,
                    place.start,
                    sizes[name],
                    flat.detach().narrow(0, place.offset, place.numel),
                    {key: moment.narrow(0, place.offset, place.numel) for key, moment in moments},
                    of=_partition_name(place.group),
                    at=place.offset,
                )
            )
        return slices

    @final
    def optimizer_states(self) -> list[tuple[str, Tensor, dict]]:
        states = self._zero.optimizer.state
        return [(_partition_name(number), flat, states[flat]) for number, flat in enumerate(self._partitions())]

    @property
    @final
    def state_layout(self) -> str:
        return sliced_layout(self.name, self.world_size)

    @final
    def _gather_weights(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in trained_parameters(self.unwrap()).items():
            yield name, safe_get_full_fp32_param(parameter).detach()


class Zero1Engine(ZeroEngine):
    """Optimizer state partitioned; every rank has the weights and, until the exchange, the gradients."""

    stage = 1

    @property
    def rank0_has_full_model(self) -> bool:
        return True

    def _partitions(self) -> list[Tensor]:
        return self._zero.single_partition_of_fp32_groups

    def _fragment_of(self, parameter: Any) -> Fragment | None:
        if (place := parameter._hp_mapping) is None:
            return None
        part = place.hp_fragment_address
        return Fragment(place.param_group_index, part.start, place.lp_fragment_address.start, part.numel)

    def _step_partitions(self) -> None:
        self._zero.optimizer.step()

    def sync_after_load(self) -> None:
        self._zero.update_lp_params()


class Zero2Engine(Zero1Engine):
    """Gradients partitioned too."""

    stage = 2


class Zero3Engine(ZeroEngine):
    """Parameters partitioned too, and gathered where a layer computes."""

    stage = 3
    _norm_method = "_get_norm_groups"  # a list of norms

    @property
    def rank0_has_full_model(self) -> bool:
        return False

    @property
    def trained_sizes(self) -> dict[str, int]:
        return {name: parameter.ds_numel for name, parameter in trained_parameters(self.unwrap()).items()}

    def _partitions(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def _place_of(self, parameter: Any) -> tuple[int, int, int]:
        """(group, offset, elements with padding) of the parameter in this rank's partitions."""
        return self._zero.grad_position[self._zero.get_param_id(parameter)]

    def _fragment_of(self, parameter: Any) -> Fragment:
        group, offset, size = self._place_of(parameter)
        start = size * self.rank
        return Fragment(group, offset, start, max(0, min(size, parameter.ds_numel - start)))  # the last are padded

    def _step_partitions(self) -> None:
        for number in range(len(self._partitions())):
            self._zero._optimizer_step(number)  # the inner optimizer knows a group's tensor only while it steps it

    def sync_after_load(self) -> None:
        # What is gathered holds the weights from before, and small parameters always are: the next pass gathers anew.
        self._zero.empty_partition_cache()
        for parameter in trained(self.unwrap()):
            group, offset, size = self._place_of(parameter)
            parameter.ds_tensor.data.copy_(self._partitions()[group].narrow(0, offset, size))
        if self.device.type == "cuda":  # DeepSpeed gathers on a stream of its own, which waits for none
            torch.cuda.current_stream(self.device).synchronize()


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


def _partition_name(number: int) -> str:
    return f"partition {number}"
