"""The page docs/planning.md: FLUX.1-Fill on every GPU profile, planned by the recipes.

python -m launch.plan.page > docs/planning.md
"""

import re
from collections.abc import Iterator, Sequence

from configs.fit import Cluster
from configs.flux_shape import FluxShape
from configs.gpu_profiles import GpuProfile, gpu_names, load_gpu_profile
from configs.loading import load_config
from configs.memory import GIB
from configs.plan import plan_run
from configs.schema import Config
from configs.step_time import ASSUMPTIONS, NIC_GBIT_S
from launch.command import REPO_ROOT
from launch.plan.asked import sample_tokens

_GLOBAL_BATCH = 512
_SIDES = (512, 1024)
_NODES = (1, 2, 4, 8, 16, 32, 64)
_GPUS_PER_NODE = 8
_METHODS = {"full": ("fill_full", "Full fine-tune"), "lora": ("fill_lora", "LoRA of rank 32")}
_HEAD = f"""# Planning a run

<!-- Generated: python -m launch.plan.page > docs/planning.md -->

`fluxfill plan CONFIG.yaml --gpu h100-80gb --nodes 2` says what a run takes on GPUs that need not be there: for each
engine the micro-batch and the number of checkpointed blocks that fit, memory of a GPU part by part (with an online
run's encoders, where they share it) and of one that encodes for others, host memory, bytes over the node's links and
over the network, seconds, hours, GPU-hours of all that are asked for, and bytes on disk. It chooses the fastest that
fits, of several within 3 % the simplest, and says why the others lost. It needs no torch and no GPU. What `--gpu`,
`--nodes` and `--gpus-per-node` leave open is taken from the config's section `slurm`. A config whose own engine (of
`auto` the one that `fluxfill train` takes: `ddp` on several GPUs, `single` on one), micro-batch or checkpointing does
not fit is refused (exit code 2) with the nearest that does; of one that fits, and is not what was chosen, a line says
what it takes. `--write` puts the plan into the config, and with it every `key=value` of the command line, because the
plan is of both; its other lines stay as they are, and a value that changes loses the comment behind it. `--json` prints
all. A run whose `train.micro_batch_size` or `train.activation_checkpointing` is `auto` decides them by the same
functions (`configs/fit.py`), from what is free on its GPUs once the model is there.

`fluxfill gpus list` shows the profiles that `--gpu` takes by name. `fluxfill gpus detect --write NAME` makes one of the
machine that it runs on: memory, NVLink, network and GPUs of a node as found there, rates as those of the known card of
its name. Your own profiles are files in `~/.config/fluxfill/gpus` (or under `XDG_CONFIG_HOME`), taken by name like the
others, and `--gpu ./my.yaml` takes a file from anywhere.

**Nothing on this page was measured on a GPU.** Weights, gradients, optimizer state and buffers are by formula
(`configs/memory.py`). Activations, arithmetic and bytes moved come from running the project's own step on fake tensors
under CUDA's rules (`trainer/simulation/`), stored in `configs/step_costs.json` by
`python -m trainer.simulation.table`; `--simulate` runs the chosen step again, on the model of the config. Between the
stored points all is a line of the tokens and of the adapter's rank: within 2 % of simulations from 256 to 1,024 px and
rank 16 to 128, which a test holds. 4-bit and fp8 bases count as int8, lists of layers as all of them. Seconds hang on
assumptions, and are good for comparing plans:

> {ASSUMPTIONS}

A trained weight takes, with its gradient and its optimizer's state, 16 bytes (fp32 weights and `adamw`; under ZeRO
bf16 weights and gradients beside fp32 weights and moments), 10.03 (`adamw8bit`: moments in 8 bits, and a scale for 256
of them), 8 (`adafactor`; or `weights: bf16_stochastic`, where all is in bf16) or 24 (`prodigy`); a moving average is 4
more. Tests hold these within 1 % of what is really kept. Not offered: 12 bytes, of bf16 moments beside fp32 weights,
for which there is no key; and 6, of 8-bit moments beside bf16 weights, which are refused: stochastic rounding is part
of AdamW here and rounds its moments too, and without it weights in bf16 lose small updates.

A plan fills nine tenths of a card: the allocator's gaps, and the workspaces of cuBLAS and cuDNN, are in no formula.
What GPUs exchange is a model too: from each GPU that holds a part comes an equal share, so that the more nodes share
the weights, the more of them comes over the network.

## FLUX.1-Fill, 11.9 B parameters
A global batch of {_GLOBAL_BATCH}, {_GPUS_PER_NODE} GPUs a node, the recipes otherwise as they are. A cell is engine,
micro-batch (`+12`: the first 12 of 57 blocks are checkpointed), GiB of a GPU, seconds of an optimizer step; or what it
would take. Of a GPU with `?` the network's rate is not known: from two nodes on its seconds are those of
{NIC_GBIT_S:.0f} Gbit/s a node, a guess.
"""


def _choose_rows() -> tuple[list[str], dict[str, str]]:
    """(profiles with a row, those of any card of a memory whose figures are a card's -> that card), sorted."""
    figures = {name: load_gpu_profile(name).model_dump(exclude={"name"}) for name in gpu_names()}
    cards = [name for name in figures if not re.fullmatch(r"\d+gb", name)]
    same = {name: card for name in figures.keys() - set(cards) for card in cards if figures[card] == figures[name]}
    return [name for name in figures if name not in same], dict(sorted(same.items()))


def render_page() -> str:
    """The whole page."""
    names, same = _choose_rows()
    lines = [_HEAD.rstrip()]
    if same:
        listed = ", ".join(f"`{name}` ({card})" for name, card in same.items())
        lines.append(f"Profiles without a row have the figures of a card: {listed}.")
    for recipe, title in _METHODS.values():
        for side in _SIDES:
            overrides = [f"train.global_batch_size={_GLOBAL_BATCH}", f"data.resolution={side}"]
            config = load_config(REPO_ROOT / "configs" / f"{recipe}.yaml", overrides)
            lines += ["", f"### {title}, {side} px", "", *_table(config, names)]
    return "\n".join(lines) + "\n"


def _table(config: Config, names: Sequence[str]) -> Iterator[str]:
    columns = [f"{count} node{'s' if count > 1 else ''}" for count in _NODES]
    yield f"| GPU | 1 GPU | {' | '.join(columns)} |"
    yield "| --- " * (len(columns) + 2) + "|"
    for name in names:
        profile = load_gpu_profile(name)
        cells = [_cell(config, profile, 1, 1)]
        cells += [_cell(config, profile, nodes, _GPUS_PER_NODE) for nodes in _NODES]
        yield f"| {name}{'?' if profile.nic_gbit_s is None else ''} | {' | '.join(cells)} |"


def _cell(config: Config, profile: GpuProfile, nodes: int, gpus: int) -> str:
    planned = plan_run(config, FluxShape(), Cluster(profile, nodes, gpus), tokens=sample_tokens(config))
    best = planned.best
    if best is None:
        return f"no: {planned.smallest.bytes / GIB:.1f} GiB" if planned.plans else "no"
    micro = f"{best.micro_batch_size}{f'+{best.checkpointed}' if best.checkpointed else ''}"
    return f"{best.engine} {micro}, {best.bytes / GIB:.1f} GiB, {best.time.total:.2f} s"


if __name__ == "__main__":
    print(render_page(), end="")
