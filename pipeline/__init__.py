"""Layer recycling: run the frozen lower layers once, train the upper layers from what they gave.

The data flow, top to bottom::

    raw data -> sample -> key -> prefix -> state -> segment -> store         (encode.py)
    store + sample table -> order -> loader -> suffix -> loss -> metrics     (train.py)
"""
