"""The parts of docs/performance.md on pictures, caches and commands, each from the lines of one benchmark."""

from benchmarks.page_tables import Lines, percent, table, times


def start(lines: Lines) -> str:
    rows = [
        (
            f"{line['engine']}, {line['processes']} process(es){', validates first' if line['validates'] else ''}",
            line["cpu_seconds"]["this"],
            line["cpu_seconds"].get("against"),
            line.get("ratio"),
        )
        for line in lines
    ]
    before = f"at {lines[0]['against']}" if "against" in lines[0] else "before"
    text = "Processor seconds of all processes from `accelerate launch` to the demo's first step:\n\n"
    return text + table(("run", "now", before, "over it"), rows)


def planning(lines: Lines) -> str:
    rows = [
        (
            f"{line['triples']:,} in {line['source'].replace('scan_cache', 'tars')}, {line['run']}",
            line.get("seconds"),
            line.get("cpu_seconds"),
            line["mib"],
        )
        for line in lines
    ]
    text = (
        "One process; the first time it reads, hashes and checks every picture (of 64 px), again it looks at times and "
        "sizes. `from a scan cache`: pictures that were scanned elsewhere, none of them on this disk.\n\n"
    )
    return text + table(("triples", "seconds", "processor seconds", "MiB above imports"), rows)


def order(lines: Lines) -> str:
    line = lines[0]
    rows = [
        (
            f"{line['streams']} stream(s), at {percent(line['share_of_epoch'])} of the epoch",
            line["seconds_to_first_batch"],
            line["milliseconds_a_later_batch"],
            line["peak_mib"],
        )
        for line in lines
    ]
    text = f"{line['samples']:,} samples in {line['shards']:,} shards, {line['ranks']:,} ranks, after imports:\n\n"
    return text + table(("rank", "s to its first batch", "ms a later one", "MiB at most"), rows)


def reader(lines: Lines) -> str:
    rows = [
        (
            f"{line['side']} px, batches of {line['batch_size']}, {line.get('samples', 0):,} samples",
            line["fluxfill_samples_per_s"],
            line["fluxfill_with_noise_samples_per_s"],
            line["times_webdataset"],
            percent(line["share_of_cat"]),
        )
        for line in lines
    ]
    head = ("samples", "a second", "with training's noise", "times WebDataset's", "bytes a second, of cat's")
    return "Two threads, every byte checked, a warm cache:\n\n" + table(head, rows)


def preprocess(lines: Lines) -> str:
    line = lines[-1]
    rows = [
        ("a bare loop that decodes and encodes", line["bare_pictures_per_s"], 1.0),
        ("the same, shards written in turn", line["in_turn_pictures_per_s"], None),
        ("`fluxfill preprocess`", line["job_pictures_per_s"], line["job_share_of_bare"]),
    ]
    return table(("way", "pictures a second", "of the bare loop"), rows)


def scan(lines: Lines) -> str:
    rows = [
        (
            f"{line['triples']} triples as {line['pictures']}, {line['kib_a_picture']:,} KiB a picture",
            line["triples_a_second"]["scan"],
            line["times_plain"],
            line["decode_alone_times_plain"],
            line["migrate_times_plain"],
        )
        for line in lines
    ]
    head = ("pictures of 1024 px", "triples a second", "times a plain loop", "decoding alone", "`fluxfill migrate`")
    return table(head, rows)


def cache_size(lines: Lines) -> str:
    rows = [
        (
            f"{line['side']} px, captions {line['captions']}, {line['masks']} mask(s), text {line['text_dtype']}",
            f"{line['bytes_per_sample'] / 2**20:.2f}",
            f"{line['file_per_mask_bytes_per_sample'] / 2**20:.2f}",
            line["times_smaller"],
        )
        for line in lines
    ]
    return table(("sample", "MiB", "as a file for each mask", "times smaller"), rows)


def verify(lines: Lines) -> str:
    return table(("way, warm cache", "GB/s"), list(lines[-1]["gb_per_s"].items()))


def old_way(lines: Lines) -> str:
    counted = next(line for line in lines if line["benchmark"] == "old_way_by_count")
    rows = [
        (
            f"{line['side']} px, {'all blocks checkpointed' if line['checkpointing'] else 'nothing checkpointed'}",
            *(line[name] for name in ("vae", "clip", "t5", "transformer")),
            line["plain_step"],
        )
        for line in counted["operations"]
    ]
    head = (
        "FLUX.1-Fill, one picture",
        "VAE, twice",
        "CLIP",
        "T5",
        "transformer",
        "a step that encodes, over one that does not",
    )
    return "Counted, in units of 10^12 operations, a LoRA of rank 16:\n\n" + table(head, rows)


def grid(lines: Lines) -> str:
    line = lines[-1]
    rows = [
        (int(length), seconds, times(line["times_the_shortest"][length]))
        for length, seconds in line["cpu_seconds"].items()
    ]
    return table(("letters a caption", "processor seconds", "of the shortest"), rows)


def demo_run(lines: Lines) -> str:
    line = lines[-1]
    rows = [
        (name, *(f"{line[split][key]:.2f}" for key in ("untrained", "trained", "ceiling")))
        for split, name in (("train", "that it trains on"), ("holdout", "held out"))
    ]
    text = f"PSNR inside the hole in dB after {line['steps']} steps.\n\n"
    return text + table(("crops", "untrained", "trained", "the VAE's ceiling"), rows)


def help_command(lines: Lines) -> str:
    rows = [
        (what, f"{cpu:.2f}", f"{clock:.2f}") for what, (cpu, clock) in lines[-1]["seconds of CPU and clock"].items()
    ]
    return table(("what", "processor seconds", "seconds"), rows)
