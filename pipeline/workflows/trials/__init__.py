"""What `recycle plan` tries on a sample: settings before the deepest cut, and every cut.

network.py   a network on its device, run under several settings
settings.py  memory formats, precisions, sizes of batches and segments: timed, compared, recommended
encode.py    a real encode of the sample, scaled to the data set
epochs.py    training steps from its stores, scaled to an epoch
cuts.py      every cut tried: encode and epochs -> predicted costs
"""
