"""One module per verb, told from top to bottom; `stages/X.py` parses and calls `workflows/X.py`.

init.py          a look at the data -> params.yaml, dvc.yaml
encode.py        raw data -> stores, sample table
train.py         stores, sample table -> a finished run
sweep.py         a list of runs, stores, sample table -> finished runs
report.py        finished runs -> table, plot
predict.py       finished runs, inputs -> predictions
evaluate.py      a finished run, labelled samples -> scores
export.py        a finished run -> a plain model
cuts.py          a model -> every place to cut it, with costs
codec_error.py   a store -> what each codec would change
store_upkeep.py  the stores of a project, and the samples that its tables refer to
"""
