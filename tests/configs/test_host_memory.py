"""Host memory of the first node, against the counts of a full fine-tune's load and save."""

from pathlib import Path

import pytest

from configs.flux_shape import FluxShape
from configs.host_memory import host_memory
from configs.loading import load_config
from configs.memory import GIB

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def host(recipe: str, engine: str, nodes: int = 1, *overrides: str) -> dict[str, float]:
    config = load_config(CONFIGS / f"{recipe}.yaml", overrides)
    parts = host_memory(config, FluxShape(), engine, nodes=nodes, gpus_per_node=8)
    return {part.what: part.bytes / GIB for part in parts}


def test_a_save_of_a_full_fine_tune_is_a_copy_of_weights_average_and_moments():
    assert host("fill_full", "fsdp2") == {"saving": pytest.approx(111, rel=0.01)}
    assert host("fill_full", "fsdp2", 4) == {"loading": pytest.approx(44.3, rel=0.01)}  # a save is shared by the nodes
    assert host("fill_full", "hsdp", 4) == {"saving": pytest.approx(111, rel=0.01)}  # but for hsdp's


def test_a_save_that_is_not_asynchronous_holds_no_copy():
    assert host("fill_full", "fsdp2", 1, "checkpoint.async=false") == {"loading": pytest.approx(44.3, rel=0.01)}


def test_rank_0s_node_alone_reads_the_model_and_saves_for_hsdps_copies():
    config = load_config(CONFIGS / "fill_full.yaml")
    others = {"nodes": 4, "gpus_per_node": 8, "is_first": False}
    shares = [host_memory(config, FluxShape(), engine, **others) for engine in ("fsdp2", "hsdp")]
    assert [[part.bytes / GIB for part in parts] for parts in shares] == [[pytest.approx(111 / 4, rel=0.01)], [0]]


def test_an_adapter_loads_its_base_in_bf16():
    assert host("fill_lora", "ddp") == {"loading": pytest.approx(22.2, rel=0.01)}


def test_an_online_run_keeps_its_encoders_that_are_on_the_cpu():
    online = ("data.mode=online", "data.cache=x")
    loading = pytest.approx(22.2, rel=0.01)
    assert host("fill_lora", "ddp", 1, *online) == {"loading": loading}
    t5 = host("fill_lora", "ddp", 1, *online, "data.encoders.t5=cpu")
    assert t5 == {"loading": loading, "8 x T5 and CLIP": pytest.approx(8 * 18.2, rel=0.01)}
    both = host("fill_lora", "ddp", 1, *online, "data.encoder_devices=[cpu]")
    assert both == t5 | {"8 x VAE": pytest.approx(8 * 0.312, rel=0.01)}


def test_offloading_keeps_the_states_of_a_nodes_processes():
    overrides = ("train.ema_decay=null", "train.optimizer=adamw")
    one, two = (host("fill_full", "fsdp2-offload", nodes, *overrides)["states"] for nodes in (1, 2))
    assert one == pytest.approx(177.4, rel=0.01) and two == pytest.approx(one / 2)
