"""How this machine's GPUs reach one another and other machines: NVLink as the driver tells it, network ports as Linux
does."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


def nvlink_rates(index: int) -> list[float]:
    """GB/s in one direction of each active NVLink of a GPU, which the driver calls by `index`. Empty where it has
    none."""
    command = ["nvidia-smi", "nvlink", "-s", "-i", str(index)]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    rates = map(float, re.findall(r"Link \d+: ([\d.]+) GB/s", listing))
    return [rate for rate in rates if rate]  # a broken link may be told as 0 GB/s


@dataclass(frozen=True)
class Ports:
    """Network ports of one kind that are up.  gbit_s: of each, in one direction."""

    kind: str
    count: int
    gbit_s: float

    def for_each(self, gpus: int) -> float:
        """Gbit/s for each of a machine's GPUs: of the whole ports that every GPU can have, else its share of them."""
        whole = self.count // gpus
        return self.gbit_s * (whole or self.count / gpus)


def network_ports(system: Path = Path("/sys")) -> Ports | None:
    """The ports that nodes would talk by: of the RDMA ports those of the kind and rate that carry most together (others
    may be there for storage), else the fastest Ethernet interface. None where no port is up and tells its rate.

    system: where Linux mounts sysfs.
    """
    found = Counter(_rdma_ports(system))
    if found:
        (kind, rate), count = max(found.items(), key=lambda item: item[0][1] * item[1])
        return Ports(kind, count, rate)
    fastest = max(map(_ethernet_rate, (system / "class" / "net").glob("*")), default=0.0)
    return Ports("Ethernet", 1, fastest) if fastest else None


def _rdma_ports(system: Path) -> list[tuple[str, float]]:
    """(kind, Gbit/s) of every active InfiniBand or RoCE port: state "4: ACTIVE", rate "400 Gb/sec (4X NDR)"."""
    found = []
    for port in (system / "class" / "infiniband").glob("*/ports/*"):
        rate = re.match(r"([\d.]+) Gb/sec", _read(port / "rate"))
        if rate and _read(port / "state").endswith("ACTIVE"):
            kind = _read(port / "link_layer") or "InfiniBand"
            found.append(("RoCE" if kind == "Ethernet" else kind, float(rate[1])))
    return found


def _ethernet_rate(folder: Path) -> float:
    """Gbit/s of an interface that is up and a device: no bridge, no bond, no tunnel; else 0. Its file tells Mbit/s; -1,
    or an error, where a virtual card has no rate."""
    text = _read(folder / "speed") if (folder / "device").exists() and _read(folder / "operstate") == "up" else ""
    return int(text) / 1000 if text.isdecimal() else 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
