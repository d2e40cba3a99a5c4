"""Layer recycling: run the frozen lower layers once, train the upper layers from their stored output.

    raw data -> sample -> key -> prefix -> state -> segment -> store         (workflows/encode.py)
    store + sample table -> order -> loader -> suffix -> loss -> metrics     (workflows/train.py)

ARCHITECTURE.md describes the packages, from the command line down.
"""
