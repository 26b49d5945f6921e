from data.batches.order import Batch
from data.batches.row_source import PlannedMicroBatch, PlannedRow
from data.samples.geometry import Bucket


def test_places_hold_the_rows_of_the_global_batch_and_then_padding():
    """A rank's part of rows 4 to 8; this micro-batch has the last two of it."""
    batch = Batch(9, ("photos", "32x32"), 1, 70, range(4, 9), [7, 7, 5, 5, 6], [0, 1, 2, 3, 4], [0, 0, 0, 1, 1])
    planned = PlannedMicroBatch(batch, is_last=True, rows=range(7, 9), bucket=Bucket(32, 32), width=4)
    assert [planned.at(place) for place in range(4)] == [
        PlannedRow(position=77, shard=5, row=3, stream_epoch=1),
        PlannedRow(position=78, shard=6, row=4, stream_epoch=1),
        None,
        None,
    ]
