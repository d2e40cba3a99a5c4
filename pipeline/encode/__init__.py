"""Raw data -> sample -> key -> prefix -> state -> segment.

flow.py        plans what stores lack, and has the units of the plan run
config.py      the section `encode:` of params.yaml
feed.py        samples read, keyed and preprocessed beside the main process
stat_cache.py  keys of files that were read before
quarantine.py  samples set aside, and why
ragged.py      samples of unequal shapes in one batch
unit.py        the plan: which samples are encoded together, for which stores
encoder.py     one forward pass for all cuts, and the segments that it fills
encoded.py     what was done, and what it cost
"""
