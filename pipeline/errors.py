"""The tree of errors.

RecyclingError
├── ConfigError            a setting is wrong: params.yaml, or an argument of a command
│   ├── AbsentError        the setting names something that is not on this machine
│   └── NotMappableError   weights that are to stay in their files cannot
├── DataError              a data source cannot be read as described
│   └── BadSampleError     one sample cannot be used; the run sets it aside and goes on
├── ModelError             a backbone cannot be built, or its weights do not fit
├── SplitError             the network cannot be split exactly at this cut
│   ├── NoSuchCutError     the cut names no place in the network
│   └── InputRefusedError  the network's own code fails on the inputs it is given
├── StoreError             a store cannot be read or written
│   ├── StaleStoreError    the store was encoded under another recipe
│   ├── MissingKeysError   samples that were never encoded
│   └── CorruptStoreError  the bytes of a store are damaged
├── ClusterError           workers cannot be reached, or fail
└── TrainError             training cannot start, or cannot go on

Every message gives the setting or place, the value met, the bound it broke, and the remedy.
"""

import itertools
from collections.abc import Iterable


class RecyclingError(Exception):
    """Root of all errors raised on purpose; the command line prints its message without a traceback."""


class ConfigError(RecyclingError):
    """A setting is wrong. The message lists every fault found, one per line."""


class AbsentError(ConfigError):
    """A setting names something that is not on this machine; on another one it may be valid."""


class NotMappableError(ConfigError):
    """The weights of a network cannot be used where they lie, in their files; the message says why, and what to do."""


class DataError(RecyclingError):
    """A data source cannot be read as described."""


class BadSampleError(DataError):
    """One sample cannot be used: unreadable, empty, or without a finite state."""


class ModelError(RecyclingError):
    """A backbone cannot be built, or its weights do not fit it."""


class SplitError(RecyclingError):
    """The network cannot be split exactly at this cut; the message names the reason."""


class NoSuchCutError(SplitError):
    """The cut names no place in the network; the message names the nearest ones."""


class InputRefusedError(SplitError):
    """The network's own code fails on the inputs it is given; its error is the cause, the message has both."""


class StoreError(RecyclingError):
    """A store cannot be read or written."""


class StaleStoreError(StoreError):
    """The store was encoded under another recipe; the message names the first field that differs.

    Attributes:
        difference: the message without its remedy.
    """

    def __init__(self, difference: str, remedy: str = "") -> None:
        super().__init__(f"{difference}; {remedy}" if remedy else difference)
        self.difference = difference


class MissingKeysError(StoreError):
    """Some samples were never encoded; the message names up to five."""


class CorruptStoreError(StoreError):
    """The bytes of a store are damaged."""


class ClusterError(RecyclingError):
    """The workers of an encode cannot be reached, or fail."""


class TrainError(RecyclingError):
    """Training cannot start, or cannot go on."""


def first_few(names: Iterable[str], count: int = 5) -> str:
    """Return the first `count` of `names` for a message, with "..." if there are more."""
    shown = list(itertools.islice(names, count + 1))
    return ", ".join([*shown[:count], "..."] if len(shown) > count else shown)
