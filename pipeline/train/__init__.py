"""Store + sample table -> order -> loader -> suffix -> loss -> metrics.

fit.py         `fit`: the epochs
config.py      the section `train:` of params.yaml
order.py       (seed, epoch, sizes) -> batches
loader.py      batches -> tensors on the device
objective.py   a step's loss, and the metrics of a validation
optimizer.py   parameter groups, and the learning rate's course
adapter.py     LoRA in place of the pretrained weights
run_log.py     metrics and plots, as DVC shows them
parallel.py    several processes that train as one
processes.py   what these say to each other
checkpoint.py  what a killed run goes on from
"""
