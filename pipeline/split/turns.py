"""Calls that take turns: each in a thread of its own, one of them running at a time, until it waits at a place.

The order of the turns is this module's: all calls that wait at the place of the first one go on before it does again.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from pipeline.split.forward import CLOCK

Result = TypeVar("Result")


class _Abandoned(BaseException):
    """Ends a call that will get no further turn; not an Exception, so that no `except` in a model's code stops it."""


class _Thread(threading.local):
    turn: "Turn[Any] | None" = None


_THREAD = _Thread()


def current() -> "Turn[Any] | None":
    """Return the turn of the call that runs in this thread; None outside of `take_turns`."""
    return _THREAD.turn


class Turn(Generic[Result]):
    """A call that runs when it is told to.

    Attributes:
        at: the place where it waits; None before its start and after its end.
        size: bytes that it holds there, as it said at the first place.
    """

    def __init__(self, call: Callable[[], Result]) -> None:
        self.at: str | None = None
        self.size = 0
        self._call = call
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._is_abandoned = False
        self._modes = torch.get_num_threads(), torch.is_grad_enabled()
        self._thread = threading.Thread(target=self._run, name="section", daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let the call run to its next place, or to its end; raise what it raises."""
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """End the call where it is, unless it has ended."""
        self._is_abandoned = True
        self._go.release()
        self._thread.join()

    def result(self) -> Result:
        """Return the result of the call, which has ended."""
        return self._result[0]

    def wait(self, place: str, size: int) -> None:
        """Wait at `place` for the next turn, holding `size` bytes; this thread's clocks stand still meanwhile."""
        began = time.perf_counter()
        self.at, self.size = place, self.size or size
        self._back.release()
        self._go.acquire()
        CLOCK.paused += time.perf_counter() - began
        if self._is_abandoned:
            raise _Abandoned

    def _run(self) -> None:
        self._go.acquire()
        threads, with_gradients = self._modes
        torch.set_num_threads(threads)  # each thread has a number of its own
        _THREAD.turn, CLOCK.is_shared = self, True
        try:
            if not self._is_abandoned:
                with torch.set_grad_enabled(with_gradients):
                    self._result.append(self._call())
        except _Abandoned:
            pass
        except BaseException as error:  # it is raised again in the thread that gives the turns
            self._error = error
        finally:
            self.at = None
            self._back.release()


def take_turns(calls: Sequence[Callable[[], Result]], fits: Callable[[int], bool]) -> list[Result]:
    """Return the results of `calls`, in groups: no further one starts in a group whose bytes would not be `fits`."""
    waiting, running = deque(map(Turn, calls)), list[Turn[Result]]()
    results = [turn.result for turn in waiting]
    try:
        while waiting:
            while waiting and (not running or fits(running[0].size * (len(running) + 1))):
                running.append(waiting.popleft())
                running[-1].go_on()
            while running := [turn for turn in running if turn.at is not None]:
                place = running[0].at
                for turn in [turn for turn in running if turn.at == place]:
                    turn.go_on()
    finally:
        for turn in [*running, *waiting]:
            turn.abandon()
    return [result() for result in results]
