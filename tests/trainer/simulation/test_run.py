"""The program that launch/ asks for a simulation."""

from configs.flux_shape import FluxShape


def test_what_is_asked_is_answered_line_by_line(simulate):
    shape = vars(FluxShape(1, 1, width=64, head_width=32, text_width=16, pooled_width=16))
    asked = {"method": {"type": "lora", "rank": 4}, "shape": shape, "side": 64, "text": 16}
    plain, checkpointed = simulate({**asked, "checkpointed": 0}, {**asked, "precision": "auto"})
    assert plain["kept"] > checkpointed["kept"] > 0
    assert plain["matmul_flops"] < checkpointed["matmul_flops"]
    assert plain["peak"] == max(plain["single_peak"], plain["double_peak"])
