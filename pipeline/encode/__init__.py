"""Raw data -> sample -> key -> prefix -> state -> segment.

config.py      the section `encode:` of params.yaml
keying.py      sample keys, read once per content, and those of files that were read before
run.py         the inner flow: plan what stores lack, run the units of the plan, check
unit.py        the plan: which samples are encoded together, for which stores; what was done, and what it cost
encoder.py     one forward pass for all cuts, and the segments that it fills
transfer.py    copies to and from an accelerator while it computes
decoding.py    samples read and preprocessed beside the main process
ragged.py      samples of unequal shapes in one batch
quarantine.py  samples set aside, and why
"""
