"""Seconds of an optimizer step, estimated: the simulated work at assumed shares of a GPU's rates. Nothing was measured.
Only ratios between plans are meant to hold."""

from dataclasses import dataclass

from configs.communication import Exchange, Exchanges
from configs.errors import InputError
from configs.gpu_profiles import GpuProfile
from configs.step_costs import StepCost

# Shares of a maker's rates that kernels of this kind reach; of an H100 650 and 400 TFLOP/s and 2.6 TB/s.
MATMUL_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.66, 0.40, 0.78
LINK_SHARE = 0.8
KERNEL_SECONDS = 10e-6  # in which Python starts one: what a small step waits for
PCIE_GB_S = 25.0  # one direction, where there is no NVLink, and to the host's memory
NIC_GBIT_S = 100.0  # of a node, where the profile has no figure for each GPU
HOST_GB_S = 20.0  # of the host's memory for each process's optimizer, under the offload engines
ASSUMPTIONS = (
    f"Assumed, not measured: {MATMUL_SHARE:.0%} of the bf16 rate in matrix products, {ATTENTION_SHARE:.0%} in attention"
    f", {BANDWIDTH_SHARE:.0%} of the memory bandwidth in all else, {KERNEL_SECONDS * 1e6:.0f} us a kernel at least, "
    f"{LINK_SHARE:.0%} of links; PCIe {PCIE_GB_S:.0f} GB/s and {NIC_GBIT_S:.0f} Gbit/s a node where a profile names "
    "none; offloading hides behind nothing; every sample as large as the largest bucket."
)


@dataclass(frozen=True)
class StepTime:
    """Seconds.  work: of the GPU in one micro-step.  exposed: what an optimizer step waits, beyond its work, for what
    crosses between GPUs and to the host's memory.  update: of the optimizer.  total: of the step."""

    work: float
    exposed: float
    update: float
    total: float


def step_time(
    profile: GpuProfile,
    cost: StepCost,
    exchanged: Exchanges,
    *,
    micro_steps: int,
    gpus_per_node: int,
    update_bytes: float,
    offloaded_bytes: float = 0,
    host_update: bool = False,
) -> StepTime:
    """Seconds of an optimizer step.

    update_bytes: that the optimizer reads and writes.  offloaded_bytes: that cross to and from the host's memory in
    each micro-step.  host_update: the update is made there.  Raises InputError for a profile without rates.
    """
    if profile.bf16_tflops is None or profile.memory_bandwidth_gb_s is None:
        raise InputError(
            f"{profile.name}: its profile has no bf16_tflops or no memory_bandwidth_gb_s, and seconds hang on both. "
            "Put them there, from its maker's data sheet."
        )
    rate, bandwidth = profile.bf16_tflops * 1e12, profile.memory_bandwidth_gb_s * 1e9
    work = cost.matmul_flops / (MATMUL_SHARE * rate) + cost.attention_flops / (ATTENTION_SHARE * rate)
    work = max(work + cost.traffic / (BANDWIDTH_SHARE * bandwidth), cost.kernels * KERNEL_SECONDS)

    def seconds(exchange: Exchange) -> float:
        node = PCIE_GB_S * 1e9 if profile.nvlink_gb_s is None else profile.nvlink_gb_s / 2 * 1e9
        nic = profile.nic_gbit_s or NIC_GBIT_S / gpus_per_node
        return (exchange.node / node + exchange.network / (nic / 8 * 1e9)) / LINK_SHARE

    # Gathers run beside the work; in the last micro-step gradients too, beside its backward pass, two thirds of it.
    # Both cross the same links.
    gathers, gradients = seconds(exchanged.each_micro_step), seconds(exchanged.gradients)
    exposed = (micro_steps - 1) * max(0.0, gathers - work) + seconds(exchanged.weights)
    exposed += max(0.0, gathers + gradients - work, gradients - 2 / 3 * work)
    exposed += micro_steps * offloaded_bytes / (PCIE_GB_S * 1e9)
    update = update_bytes / (HOST_GB_S * 1e9 if host_update else BANDWIDTH_SHARE * bandwidth)
    return StepTime(work, exposed, update, micro_steps * work + exposed + update)
