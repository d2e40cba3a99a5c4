"""Layer recycling in your own training loop: run the frozen layers once per sample, and train the rest from a store.

`split` a network, `encode` a data set into a store, train the suffix from `store.dataset()` or `store.loader()` by any
loop or framework, and `merge` it into the network: docs/library.md.
"""

from pipeline.errors import (
    CorruptStoreError,
    DataError,
    MissingKeysError,
    RecyclingError,
    SplitError,
    StaleStoreError,
    StoreError,
)
from pipeline.library.adopt import adopt
from pipeline.library.encode import encode
from pipeline.library.project import OpenProject, open_project
from pipeline.library.recipe import split
from pipeline.library.states import export_states, open_states
from pipeline.library.store import StateDataset, StateLoader, StateStore, open_store
from pipeline.split import Candidate, Prefix, Suffix, candidates, merge

__all__ = [
    "Candidate",
    "CorruptStoreError",
    "DataError",
    "MissingKeysError",
    "OpenProject",
    "Prefix",
    "RecyclingError",
    "SplitError",
    "StaleStoreError",
    "StateDataset",
    "StateLoader",
    "StateStore",
    "StoreError",
    "Suffix",
    "adopt",
    "candidates",
    "encode",
    "export_states",
    "merge",
    "open_project",
    "open_states",
    "open_store",
    "split",
]
