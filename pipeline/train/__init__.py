"""Store + sample table -> order -> loader -> suffix -> loss -> metrics.

fit.py         `fit`: training, validation and checkpoint, round by round
stacked.py     `fit_stacked`: several runs of a small suffix at once
stacked_steps.py  their optimizer and their products
rounds.py      the steps of a run, and the spans between two validations
optimizer.py   the optimizer by name, its groups of parameters and its schedule
optimizer_kinds.py  which optimizers there are, and what they take
config.py      the section `train:` of params.yaml
order.py       (seed, epoch, sizes) -> batches
loader.py      batches -> tensors on the device
objective.py   the module that is trained: a step's loss, over several processes, and the metrics of a validation
adapter.py     adapters beside frozen pretrained weights
adapter_files.py  what training added to the weights, as peft's files
run_log.py     metrics and plots, as DVC shows them
trackers.py    experiment trackers, by accelerate
processes.py   their ranks, and what they exchange
checkpoint.py  what an interrupted run resumes from
"""
