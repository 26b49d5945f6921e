"""One rank of the all-reduce: what the GPU and the way to the other nodes can do, said line by line.

    python -P -m launch.preflight.all_reduce RANK LOCAL_RANK

Imports torch at once, then waits for a line of standard input: {"world": ranks, "processes": on each node, "head":
address, "port": port, "seconds": patience}, or its end. Each line of standard output is an object with a "stage".
"""

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

STAGES = ("importing", "imported", "joined", "connected", "done")
_MEGABYTES = 64
_ROUNDS = 3
_MATRIX = 4096  # on a GPU; smaller on a CPU


def main(arguments: Sequence[str] | None = None) -> None:
    rank, local_rank = map(int, sys.argv[1:] if arguments is None else arguments)
    debug = Path(tempfile.mkstemp(prefix="fluxfill-nccl-")[1])
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": str(debug)}
    start = None
    try:
        import torch

        is_gpu = torch.cuda.is_available()
        _say("imported", gpu=torch.cuda.get_device_name(local_rank) if is_gpu else None)
        go = json.loads(sys.stdin.readline() or "null")
        start = time.monotonic()
        if go is not None:
            _run(rank, local_rank, is_gpu, go, debug)
    except Exception as error:  # whatever a driver or a network raises is this rank's finding
        after = 0.0 if start is None else time.monotonic() - start
        _say("failed", error=f"{type(error).__name__}: {error}".splitlines()[0], failed_after=after)
        sys.exit(1)
    finally:
        debug.unlink(missing_ok=True)


def _run(rank: int, local_rank: int, is_gpu: bool, go: dict, debug: Path) -> None:
    import torch
    from torch import distributed as dist

    patience = timedelta(seconds=go["seconds"])
    device = torch.device("cuda", local_rank) if is_gpu else torch.device("cpu")
    if is_gpu:
        torch.cuda.set_device(device)
    store = dist.TCPStore(go["head"], go["port"], go["world"], is_master=rank == 0, timeout=patience)
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=go["world"],
        timeout=patience,
        device_id=device if is_gpu else None,
    )
    _say("joined")
    size = _MATRIX if is_gpu else _MATRIX // 16
    matrix = torch.ones(size, size, dtype=torch.bfloat16 if is_gpu else torch.float32, device=device)
    product = _seconds(lambda: matrix @ matrix, device)
    one = torch.ones(1, device=device)
    dist.all_reduce(one)
    if int(one.item()) != go["world"]:
        raise RuntimeError(f"the sum of {go['world']} ranks is {one.item()}")
    _say("connected")
    payload = torch.ones(_MEGABYTES << 18, device=device)  # fp32
    ring = _seconds(lambda: _pass_on(payload[: 1 << 22], rank, go), device) if go["world"] > go["processes"] else None
    dist.barrier()
    seconds = _seconds(lambda: dist.all_reduce(payload), device)
    share = 2 * (go["world"] - 1) / go["world"]
    _say(
        "done",
        product_seconds=product,
        ring_seconds=ring,
        all_reduce_seconds=seconds,
        gigabytes_per_second=share * payload.nbytes / seconds / 1e9,
        network=_network(debug) if is_gpu else _gloo_network(),
    )
    dist.destroy_process_group()


def _pass_on(payload: Any, rank: int, go: dict) -> None:
    """To the rank of the same number on the next node, while that of the one before comes here."""
    import torch
    from torch import distributed as dist

    world, step = go["world"], go["processes"]
    received = torch.empty_like(payload)
    sends = dist.P2POp(dist.isend, payload, (rank + step) % world)
    receives = dist.P2POp(dist.irecv, received, (rank - step) % world)
    for work in dist.batch_isend_irecv([sends, receives]):
        work.wait()


def _seconds(work: Any, device: Any) -> float:
    """Of the quickest of a few, after one that warms up."""
    import torch

    times = []
    for _ in range(_ROUNDS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _network(debug: Path) -> str | None:
    """What NCCL says it uses between nodes, such as "IB mlx5_0:1/IB" or "Socket eth0:10.0.0.1"."""
    found = re.search(r"NET/(\w+) : Using (.*)", debug.read_text(encoding="utf-8", errors="replace"))
    return None if found is None else f"NCCL over {found[1]} {found[2].strip()}"


def _gloo_network() -> str:
    return f"gloo over {os.environ.get('GLOO_SOCKET_IFNAME', 'the interface of this host by its name')}"


def _say(stage: str, **figures: Any) -> None:
    print(json.dumps({"stage": stage, **figures}), flush=True)


if __name__ == "__main__":
    main()
