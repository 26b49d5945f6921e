"""The stored table against simulations made now, and its lines between the stored points."""

import pytest

from configs.flux_shape import FluxShape
from configs.schema import DoraConfig, FullConfig, LokrConfig, LoraConfig
from configs.step_costs import base_pass, step_cost
from data.samples.geometry import Bucket
from trainer.simulation.table import TEXT, entries

QUANTITIES = ("kept", "peak", "matmul_flops", "traffic", "kernels")


def compare(simulate, asked: list[tuple], rel: float) -> None:
    """Models of a few blocks, simulated and by the table.  asked: method, precision, checkpointed, side, shape."""
    simulated = simulate(
        *(
            {
                "method": method.model_dump(mode="json"),
                "precision": precision,
                "checkpointed": checkpointed,
                "side": side,
                "shape": vars(shape),
            }
            for method, precision, checkpointed, side, shape in asked
        )
    )
    for (method, precision, checkpointed, side, shape), found in zip(asked, simulated, strict=True):
        tokens = Bucket(side, side).tokens + TEXT
        stored = step_cost(method, precision, shape, checkpointed=checkpointed, tokens=tokens)
        for name in QUANTITIES:
            near = pytest.approx(found[name], rel=rel, abs=2**21)  # bytes; the loss's target is 1 MiB at 1024 px
            assert getattr(stored, name) == near, (method.type, precision, side, name)
        assert stored.attention_flops == pytest.approx(found["attention_flops"])


def test_a_few_rows_are_what_a_simulation_gives_now(simulate):
    """Of models with other numbers of blocks than those of which the rows were made."""
    shape = FluxShape(2, 4)
    asked = [
        (LoraConfig(type="lora"), "bf16", 6, 1024, shape),
        (LoraConfig(type="lora"), "bf16", 0, 512, shape),
        (LoraConfig(type="lora", targets="attention"), "int8", 6, 512, shape),
        (LoraConfig(type="lora"), "fp8", 6, 512, shape),
        (DoraConfig(type="dora", rank=128), "int8", 0, 1024, shape),
        (LokrConfig(type="lokr"), "bf16", 6, 512, shape),
        (FullConfig(type="full"), "bf16", 0, 1024, shape),
        (FullConfig(type="full"), "fp32", 6, 512, shape),
    ]
    compare(simulate, asked, rel=0.002)


def test_where_some_blocks_are_checkpointed_each_takes_its_own_rows_part(simulate):
    shape = FluxShape(2, 4)
    asked = [
        (LoraConfig(type="lora"), "bf16", 1, 512, shape),
        (FullConfig(type="full"), "bf16", 2, 1024, shape),
        (LoraConfig(type="lora"), "bf16", 3, 512, shape),
    ]
    compare(simulate, asked, rel=0.005)
    # DoRA's last block, where others are checkpointed, holds 0.1 GB more than where none or all are.
    compare(simulate, [(DoraConfig(type="dora", rank=128), "int8", 5, 512, shape)], rel=0.1)


def test_between_the_rows_all_is_a_line_of_tokens_and_rank(simulate):
    shape = FluxShape(2, 4)
    asked = [
        (LoraConfig(type="lora", rank=64), "bf16", 6, 768, shape),
        (LoraConfig(type="lora", rank=16), "bf16", 0, 256, shape),
        (FullConfig(type="full"), "bf16", 0, 256, shape),
    ]
    compare(simulate, asked, rel=0.02)
    # Of so few tokens a DoRA's peak lies where a weight is dequantized, which no number of tokens changes.
    compare(simulate, [(DoraConfig(type="dora", rank=64), "int8", 6, 256, shape)], rel=0.06)


def test_the_frozen_bases_own_pass_adds_what_is_reckoned_and_holds_nothing(simulate):
    shape, tokens = FluxShape(2, 4), Bucket(512, 512).tokens + TEXT
    kinds = [({"type": "lora"}, "bf16"), ({"type": "lora"}, "int8"), ({"type": "dora", "rank": 128}, "bf16")]
    asked = [{"method": method, "precision": word, "shape": vars(shape), "side": 512} for method, word in kinds]
    found = simulate(*asked, *({**one, "base_pass": True} for one in asked))
    for (_, precision), without, with_it in zip(kinds, found, found[len(asked) :], strict=False):
        reckoned = base_pass(precision, shape, tokens=tokens)
        # What lies outside the blocks is not reckoned; of all of FLUX.1 it is 1 % of the traffic.
        for name, near in (
            ("matmul_flops", {"rel": 0.01}),
            ("attention_flops", {"rel": 1e-6}),
            ("traffic", {"abs": 1e9}),
            ("kernels", {"abs": 150}),
        ):
            assert with_it[name] - without[name] == pytest.approx(getattr(reckoned, name), **near), (precision, name)
        assert with_it["peak"] == pytest.approx(without["peak"], abs=2**22)


def test_no_row_is_made_twice_and_each_is_found():
    made = list(entries())
    assert len({str(entry) for entry in made}) == len(made)
    for entry in made:
        tokens, blocks = entry.bucket.tokens + TEXT, FluxShape().blocks if entry.checkpointing else 0
        cost = step_cost(entry.method, entry.precision, FluxShape(), checkpointed=blocks, tokens=tokens)
        assert cost.peak > cost.kept > 0 and cost.matmul_flops > 0
