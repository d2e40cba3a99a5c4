"""Store + sample table -> order -> loader -> suffix -> loss -> metrics.

fit.py         `fit`: the epochs
config.py      the section `train:` of params.yaml
order.py       (seed, epoch, sizes) -> batches
loader.py      batches -> tensors on the device
objective.py   the module that is trained: a step's loss, over several processes, and the metrics of a validation
optimizer.py   parameter groups, and the learning-rate schedule
adapter.py     adapters beside frozen pretrained weights
run_log.py     metrics and plots, as DVC shows them
processes.py   their ranks, and what they exchange
checkpoint.py  what an interrupted run resumes from
"""
