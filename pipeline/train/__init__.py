"""Store + sample table -> order -> loader -> suffix -> loss -> metrics.

fit.py         `fit`: the epochs, with the optimizer and its schedule
config.py      the section `train:` of params.yaml
order.py       (seed, epoch, sizes) -> batches
loader.py      batches -> tensors on the device
objective.py   the module that is trained: a step's loss, over several processes, and the metrics of a validation
adapter.py     adapters beside frozen pretrained weights
run_log.py     metrics and plots, as DVC shows them
processes.py   their ranks, and what they exchange
checkpoint.py  what an interrupted run resumes from
"""
