"""The writer behind the device: a thread that waits for encoded tensors, writes, hashes, flushes, publishes shards.

A shard is published while its claim is still this worker's, with all samples of its plan, or not at all; what fails
leaves no part of one behind.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from configs.errors import list_problems
from data.cache.shard_writer import SampleTensors, ShardWriter
from data.encoders.device import HostCopy
from data.encoders.encode import NotFinite
from data.preprocessing.shard_queue import ShardQueue
from data.samples.plan import PlannedSample
from data.samples.shard_plan import PlannedShard

_BYTES_BEHIND = 512 << 20  # of tensors that wait to be written: while a shard is flushed, the next goes on


@dataclass(frozen=True)
class EncodedTexts:
    """A batch of captions on its way to the host.  names: of their members.  tensors: what each stores, stacked.
    tokens: real ones of each."""

    names: Sequence[str]
    tensors: dict[str, HostCopy]
    tokens: Sequence[int]


class _LostClaim(Exception):
    """Another worker has the shard: this one was stopped for so long that it was taken for dead."""


class _OpenShard:
    """A shard that is being written. Used by the writing thread alone, but for `problems`."""

    def __init__(self, cache: Path, plan: PlannedShard) -> None:
        self.plan = plan
        self.writer = ShardWriter(cache / plan.path, plan.format_version)
        self.tokens: dict[str, int] = {}
        self.problems: list[str] = []


class ShardWriting:
    """Shards in the writing, in order and a bounded number of bytes behind the device; a context manager.

    Its methods queue work for its thread; what that raises is raised by a later call, or at the end.
    """

    def __init__(self, cache: Path, queue: ShardQueue) -> None:
        self._cache, self._queue = cache, queue
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._pending_bytes = 0
        self._open: dict[str, _OpenShard] = {}
        self._stopped = False

    def __enter__(self) -> "ShardWriting":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Wait until all is written; or, if something failed, leave no part of a shard behind."""
        if kind is not None:
            self._stopped = True
        try:
            while self._pending and kind is None:
                self._wait_for_one()
        finally:
            self._thread.shutdown(cancel_futures=True)
            with ExitStack() as parts:  # the others go even if one cannot be removed
                for shard in self._open.values():
                    parts.push(shard.writer)

    def _submit(self, num_bytes: int, function: Callable[..., None], *arguments: object) -> None:
        self._pending.append((self._thread.submit(self._run, function, *arguments), num_bytes))
        self._pending_bytes += num_bytes
        while self._pending and (self._pending[0][0].done() or self._pending_bytes > _BYTES_BEHIND):
            self._wait_for_one()

    def _run(self, function: Callable[..., None], *arguments: object) -> None:
        """Run queued work, unless something failed: what is behind it would finish a shard that lacks what it wrote."""
        if self._stopped:
            return
        try:
            function(*arguments)
        except BaseException:
            self._stopped = True
            raise

    def _wait_for_one(self) -> None:
        written, num_bytes = self._pending.popleft()
        self._pending_bytes -= num_bytes
        written.result()

    def _shard(self, plan: PlannedShard) -> _OpenShard:
        if plan.path not in self._open:
            self._open[plan.path] = _OpenShard(self._cache, plan)
        return self._open[plan.path]

    def add_problems(self, plan: PlannedShard, problems: Sequence[str]) -> None:
        """Have a shard fail, with these lines among others."""
        self._shard(plan).problems += problems

    def has_problems(self, plan: PlannedShard) -> bool:
        """Whether a shard will fail, as far as is known by now."""
        return bool(self._shard(plan).problems)

    def add_texts(self, plan: PlannedShard, texts: EncodedTexts) -> None:
        """Captions of a shard, ahead of the samples that use them."""
        num_bytes = sum(copy.num_bytes for copy in texts.tensors.values())
        self._submit(num_bytes, _write_texts, self._shard(plan), texts)

    def add_samples(
        self,
        plan: PlannedShard,
        samples: Sequence[PlannedSample],
        masks: Tensor,
        latents: HostCopy,
        masked_latents: HostCopy,
    ) -> None:
        """A batch of a shard's samples.  masks: bool [K, B, H, W].  latents: bf16 [B, 16, h, w].  masked_latents: bf16
        [K, B, 16, h, w]."""
        num_bytes = masks.nbytes + latents.num_bytes + masked_latents.num_bytes
        self._submit(num_bytes, _write_samples, self._shard(plan), samples, masks, latents, masked_latents)

    def finish(self, plan: PlannedShard) -> None:
        """Publish a shard of which everything was added, or report its problems to the queue."""
        self._submit(0, self._finish, plan, self._shard(plan))

    def _finish(self, plan: PlannedShard, shard: _OpenShard) -> None:
        with shard.writer:
            if shard.problems:
                self._queue.fail(plan, list_problems(shard.problems))
            else:
                self._publish(plan, shard.writer)
        del self._open[plan.path]

    def _publish(self, plan: PlannedShard, writer: ShardWriter) -> None:
        if writer.num_samples != len(plan.samples):
            raise RuntimeError(f"{plan.path}: {writer.num_samples} of its {len(plan.samples)} samples were written")

        def check() -> None:
            if not self._queue.still_holds(plan):
                raise _LostClaim

        try:
            writer.finish(plan=plan.plan, check=check)
        except _LostClaim:
            pass
        except FileNotFoundError:
            if self._queue.still_holds(plan):
                raise
            # Taken for dead in this moment: whoever has the shard now has cleared this one's part away.
        self._queue.finish(plan)


def _write_texts(shard: _OpenShard, texts: EncodedTexts) -> None:
    tensors = {name: copy.wait() for name, copy in texts.tensors.items()}
    for row, name in enumerate(texts.names):
        try:
            shard.writer.add_text(name, **{tensor: stacked[row] for tensor, stacked in tensors.items()})
        except NotFinite as error:
            said = next(sample for sample in shard.plan.samples if sample.text == name)
            shard.problems.append(f"{said.triple.target}: {error} The caption: {said.triple.caption!r}")
        shard.tokens[name] = texts.tokens[row]


def _write_samples(
    shard: _OpenShard,
    samples: Sequence[PlannedSample],
    masks: Tensor,
    latents: HostCopy,
    masked_latents: HostCopy,
) -> None:
    for row, sample in enumerate(samples):
        tensors = SampleTensors(
            key=sample.key,
            latents=latents.wait()[row],
            masked_latents=list(masked_latents.wait()[:, row]),
            masks=list(masks[:, row].numpy()),
            text=sample.text,
            tokens=shard.tokens[sample.text],
            meta=describe_sample(sample),
        )
        try:
            if not shard.problems:  # else the shard will not be, and the text may not be there
                shard.writer.add_sample(tensors)
        except NotFinite as error:
            shard.problems.append(f"{sample.triple.target}: {error}")


def describe_sample(sample: PlannedSample) -> dict:
    """The JSON member of a sample, but for what ShardWriter adds."""
    triple, crop = sample.triple, sample.crop
    return {
        "caption": triple.caption,
        "dataset": triple.dataset,
        # Below its dataset's folder: a shard's bytes are the same wherever the pictures lie.
        "target": f"{triple.name}{triple.target.suffix}",
        "original_size": [sample.size[1], sample.size[0]],
        "resized": [crop.height, crop.width],
        "crop": [crop.top, crop.left, sample.bucket.height, sample.bucket.width],
        "flip": sample.flip,  # after the crop
        "fingerprint": triple.content,
    }
