import math

from launch.report.curves import MOST_POINTS, make_curve, thin


def test_a_thinned_curve_keeps_ends_peaks_and_gaps():
    points = [(step, math.sin(step / 500)) for step in range(100_000)]
    points[70_001] = (70_001, 50.0)
    points[30_007] = (30_007, -50.0)
    points[50_003] = (50_003, None)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 2 and kept == sorted(kept, key=lambda point: point[0])
    assert {points[0], points[-1], (70_001, 50.0), (30_007, -50.0), (50_003, None)} <= set(kept)


def test_a_short_curve_is_whole():
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}, {"step": 3, "loss": float("nan")}, {"loss": 9}]
    assert make_curve([*lines, {"step": 4, "loss": "0.1"}], "loss") == {"x": [1, 2, 3, 4], "y": [0.5, None, None, None]}


def test_a_figure_that_no_line_has_is_no_curve():
    assert make_curve([{"step": 1, "peak_memory_gib": None}], "peak_memory_gib") is None
