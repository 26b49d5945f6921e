"""The parts of docs/performance.md that are about training steps, each from the lines of one benchmark."""

from typing import Any

from benchmarks.page_tables import Lines, percent, table, times

_MEASURED = {
    "naive": "naive: VAE, CLIP, T5 and transformer in fp32 in the loop, AdamW, nothing checkpointed",
    "in_loop": "competent: the same encoders in the loop, text and base in bf16, all blocks checkpointed",
    "ours": "this trainer, a cache, its defaults on a CPU (fp32)",
    "ours_bf16": "this trainer in bf16",
    "ours_least": "this trainer in bf16, all blocks checkpointed",
}
_COUNTED = {
    "naive": "naive: all in fp32, encoders in the loop, nothing checkpointed",
    "in_loop": "competent: bf16, encoders in the loop, all blocks checkpointed",
    "ours": "this trainer, bf16, no block checkpointed",
    "ours_least": "this trainer, bf16, all blocks checkpointed",
    "ours_nf4": "this trainer, base in nf4, all blocks checkpointed",
}


def before_after(lines: Lines) -> str:
    parts = [
        "The old document promises 79 to 40 GB and 3.5 to 1.2 s a step. Here the same model and pictures by three "
        "ways, one picture a step, LoRA of rank 16. Everything over the naive way's:\n"
    ]
    for line in (line for line in lines if line["benchmark"] == "before_after"):
        model = "the demo's tiny model" if line["model"] == "tiny" else "all of FLUX.1's layers, an eighth as wide"
        parts.append(f"Measured on a CPU, {model}, {line['side']} px, {line['steps']} steps of each in turn:\n")
        rows = [
            (_MEASURED[name], times(of["cpu_seconds"]), times(of["seconds"]), times(of["memory"]))
            for name, of in line["of_naive"].items()
        ]
        parts.append(table(("way", "processor seconds", "seconds", "peak memory"), rows))
        naive = f"{line['naive_cpu_seconds']} processor seconds a step, {line['naive_mib']:,} MiB above imports"
        parts.append(f"The naive way takes {naive}.\n")
    counted = [line for line in lines if line["benchmark"] == "before_after_by_count"]
    if not counted:
        return "\n".join([*parts, "FLUX.1-Fill of 12 B: not counted yet.\n"])
    parts.append(
        f"FLUX.1-Fill of 12 B, T5 of 512 tokens. GiB are counted; seconds are estimated for one {counted[0]['gpu']} "
        "by the shares of its rates that `fluxfill plan` assumes, fp32 at its fp32 units' rate, decoding left out. "
        "**Nothing of this was measured.**\n"
    )
    estimates = []
    for line in counted:
        word = "bf16 weights, rounded at random" if line["method"] == "full" and line["way"] == "ours_least" else ""
        way = _COUNTED[line["way"]] if not word else f"this trainer, {word}, all blocks checkpointed"
        of = line["gib_by_part"]
        gib = (of["weights"], of["gradients and optimizer"], of["activations"], of.get("encoders", 0))
        figures = (*(f"{value:.1f}" for value in gib), f"{line['gib']:.1f}", f"{line['estimated_seconds']:.2f}")
        estimates.append((f"{line['method']}, {line['side']} px; {way}", *figures))
    head = ("way", "weights", "gradients, optimizer", "activations", "encoders", "GiB in all", "s a step, estimated")
    return "\n".join([*parts, table(head, estimates)])


def step_cost(lines: Lines) -> str:
    """Of lines that are compared already (what, build, value, target, ratio), or of two builds' counts."""
    text = "One micro-step of FLUX.1-Fill of 12 B as the trainer runs it, counted on a pretended CUDA device:\n\n"
    if any("what" in line for line in lines):
        keys = ("what", "build", "value", "target", "ratio")
        return text + table(keys, [tuple(line.get(key) for key in keys) for line in lines if "what" in line])
    from benchmarks.step_cost import targets

    builds: dict[str, dict] = {"before": {}, "after": {}}
    for line in lines:
        builds[line["build"]][line["case"], line["blocks"]] = line
    text = text.replace(":\n", "; `at most` is what it was to come down to, and **bold** what has not:\n", 1)
    rows = [
        (
            what,
            f"{old:.1f}",
            f"**{new:.1f}**" if new > limit + 0.05 else f"{new:.1f}",
            f"{new / old:.2f}" if abs(old) > 0.05 else "",
            f"{limit:.1f}",
        )
        for what, old, new, limit in targets(builds["before"], builds["after"])
    ]
    return text + table(("what", f"at {lines[0]['against']}", "now", "ratio", "at most"), rows)


def overhead(lines: Lines) -> str:
    parts = []
    for line in lines:
        parts.append(
            f"The trainer's step takes **{100 * (line['ratio'] - 1):+.1f} %** processor seconds beside a bare PyTorch "
            f"loop on the same tensors ({_model(line)}, {line['side']} px, {line['steps']} steps of each in turn). The "
            "bound is +3 %. A figure below 0 is noise: the trainer does all that the loop does. Where the time of its "
            "steps goes, by the clock:\n"
        )
        rows = [(phase, f"{share:.2f} %") for phase, share in line["percent_of_step"].items()]
        rest = 100 - sum(line["percent_of_step"].values())
        parts.append(table(("phase", "of the step"), [*rows, ("between them", f"{rest:.2f} %")]))
    parts.append("`train.profile_steps` writes a profiler's trace of any step ([running.md](running.md)).\n")
    return "\n".join(parts)


def _model(line: dict[str, Any]) -> str:
    return "the demo's tiny model" if line["model"] == "tiny" else "all of FLUX.1's layers, an eighth as wide"


def peer(lines: Lines) -> str:
    line = lines[-1]
    names = {
        "peer": "diffusers and accelerate by hand (`benchmarks/peer_script.py`)",
        "ours_cold": "`fluxfill train`, nothing encoded yet",
        "ours_warm": "`fluxfill train`, its cache there",
    }
    rows = [
        (
            names[name],
            f"{of['cpu_first_step']:.1f}",
            f"{of['first_step']:.1f}",
            line["samples_a_cpu_second"][name],
            f"{line['batch_size'] / of['step']:.1f}",
        )
        for name, of in sorted(line["seconds"].items(), reverse=True)
    ]
    head = ("way", "processor seconds to the first step", "seconds", "samples a processor second", "a second")
    return (
        "The same tiny job, fp32 on a CPU, one thread. The peer encodes captions once at start and pictures in the "
        f"loop; it saves, validates and resumes nothing. {line['steps']} steps of {line['batch_size']}, medians of "
        f"{line['repeats']} runs in turn:\n\n{table(head, rows)}\nWith the cache there, samples a processor second are "
        f"{line['times_the_peers_samples_a_cpu_second']:.2f} times the peer's, and its first step takes "
        f"{line['of_the_peers_cpu_to_first_step']['ours_warm']:.2f} times the processor seconds.\n"
    )


def checkpoint(lines: Lines) -> str:
    line = lines[-1]
    rows = [
        (
            {"async": "`checkpoint.async`", "sync": "`checkpoint.async=false`"}.get(way, f"{way}, flushed"),
            f"{seconds:.2f}",
            times(line["stall_of_torch_save"][way]),
            f"{line['beside_seconds'][way]:.2f}",
            f"{line['memory_of_checkpoint'][way]:.2f}",
        )
        for way, seconds in line["stall_seconds"].items()
    ]
    head = ("way", "stall, s", "over torch.save's", "slower steps beside it, s", "memory, of the checkpoint")
    noise = min(line["beside_seconds"].values()) < 0
    return (
        f"A checkpoint of {line['gib']} GiB (weights and moments in fp32, hashed and flushed), one process on a CPU, "
        f"{line['rounds']} saves by each way in turn, steps of {line['step_seconds']} s:\n\n{table(head, rows)}"
        + (
            "\nA figure below 0 is noise: the steps without a save met more of the machine's other work.\n"
            if noise
            else ""
        )
    )


def scaling(lines: Lines) -> str:
    rows = [
        (
            line["engine"],
            times(line["cpu_seconds_of_one_rank"]),
            times(line["seconds_of_one_rank"]),
            f"{line['bytes_a_parameter']:.2f}",
            f"{line['by_plan_a_parameter']:.2f}",
            ", ".join(
                f"{name.strip('_')} {size:.2f}" for name, size in line["bytes_a_parameter_by_collective"].items()
            ),
        )
        for line in lines
    ]
    head = (
        *("engine", "processor seconds of a rank", "seconds"),
        *("bytes a parameter and step, counted", "by plan", "counted, by collective"),
    )
    return (
        f"Two ranks with twice the work over one, all of {lines[0]['parameters'] / 1e6:.0f} M parameters in bf16, "
        f"gloo, one thread each; medians of {lines[0]['repeats']} pairs of runs, one rank and two in turn. Bytes are "
        "what each rank gets from the other in a step with one micro-batch. For n ranks and N parameters a plan "
        "reckons, times (n - 1) / n: ddp 2 x 4 N, fsdp2 and zero3 2 x 2 N gathered and 4 N of gradients in fp32 (zero3 "
        "gathers once what DeepSpeed keeps until the backward pass, 1e9 weights), zero1 and zero2 4 N of gradients and "
        "2 N of weights, where each rank keeps more gradients than DeepSpeed's bucket has (FLUX.1 on up to 59 GPUs; "
        f"beyond, 2 x 4 N of gradients). DeepSpeed has limits as small as the model here.\n\n{table(head, rows)}"
    )


def guard(lines: Lines) -> str:
    rows = [
        (
            f"{line['engine']}, {line['processes']} process(es)",
            line["step_seconds"],
            percent(line["percent_of_step"] / 100, 4),
        )
        for line in lines
    ]
    return "Of a step, the guard's checks, with `guard.loss_spike`:\n\n" + table(("run", "s a step", "of it"), rows)
