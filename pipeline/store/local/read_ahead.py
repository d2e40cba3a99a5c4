"""Segments fetched before the batches that need them: as far ahead as there is room, none twice."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from pipeline.store.local.reader import Reader

QUEUED = 32
"""Requests that may wait in the queue: to look at all segments of an epoch at once takes long."""


class ReadAhead:
    """Fetches the segments of an epoch in the order in which its batches need them, several at a time.

    Fetched segments that are still needed in this epoch never exceed the room. Where the order allows it, as that of
    `order.Window` does, each segment is fetched once: one that no batch needs any more makes room for the next.
    """

    def __init__(self, reader: Reader, batches: Sequence[Sequence[str]], room: int, unread: int = 0) -> None:
        """Prepare to fetch the segments that each of `batches` names, at most `room` bytes at a time.

        When a batch is waited for, up to `unread` of those before it may still be unread.
        """
        self._reader, self._batches, self._room, self._unread = reader, batches, room, unread
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}
        for number, segment in ((number, segment) for number, batch in enumerate(batches) for segment in batch):
            self._first.setdefault(segment, number)
            self._last[segment] = number
        self._waiting = deque(self._first)
        self._coming: dict[str, Future[None]] = {}
        self._queue: deque[Future[None]] = deque()
        self._taken = 0
        self._pool = ThreadPoolExecutor(reader.streams, thread_name_prefix="read-ahead")

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Start no further fetch; wait for those that run."""
        self._pool.shutdown(cancel_futures=True)

    def wait(self, number: int) -> None:
        """Return once the segments of batch `number` are fetched; call it for the batches in their order.

        Raises:
            StoreError: one cannot be fetched; CorruptStoreError where it is not what was written.
        """
        self._release(number - self._unread - 1)
        while self._waiting:
            segment = self._waiting[0]
            while self._queue and self._queue[0].done():
                self._queue.popleft()
            if self._first[segment] > number and len(self._queue) >= QUEUED:
                break
            nbytes = self._reader.outline(segment).nbytes
            if self._first[segment] > number and self._taken + nbytes > self._room:
                break
            self._waiting.popleft()
            self._taken += nbytes
            self._coming[segment] = self._pool.submit(self._reader.prefetch, segment)
            self._queue.append(self._coming[segment])
        for segment in self._batches[number]:
            self._coming[segment].result()

    def _release(self, read: int) -> None:
        """Release the segments that no batch after `read` needs."""
        for segment in self._batches[read] if read >= 0 else ():
            if self._last[segment] == read:
                self._taken -= self._reader.outline(segment).nbytes
                self._reader.release(segment)
