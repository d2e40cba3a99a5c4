"""Finished runs: what a run leaves, and how it is found again.

record.py          run.json, the identity of a run, and whether it is current
planned.py         runs to train, of a grid or a list
finished.py        a finished run opened again, with its trained suffix
input_states.py    states of a data set for finished runs: stored ones, and new ones
reference.py       what the network gave each sample before training
scored_samples.py  labelled samples to score a finished run on
predictions.py     the table that predictions are written to
"""
