"""params.yaml -> a project: its settings, its models split at their cuts, its stores opened.

settings.py           the sections of params.yaml, and the paths that follow from them
contradictions.py     settings of several sections that contradict each other
tower_config.py       the section `towers:`
model.py              the model of one encoder: built, split, its stores opened
recipe.py             the recipe of the states that a split model makes
recipe_cache.py       recipes known from an earlier encode, so that no model is built where nothing is to do
probe.py              a fixed input kept with its states: the proof that today's code still gives them
stores.py             stores opened for writing
views.py              the plain store of a cut and those of its augmented views, read as one
stored_inputs.py      inputs to split a network on, from its store
pretrained_suffix.py  pretrained weights after a cut, kept beside its store
towers.py             encoders as training and prediction open them, and several of them as one model
minimum_batch.py      how small a training batch may be
loaders.py            the batches of a run, and where they are read from
extrapolation.py      figures of a data set from those of a sample
new_params.py         the params.yaml of a new project
model_example.py      a model and inputs to try it on, without stores
linear_heads.py       linear heads on the states of many cuts, scored without stores
"""

from pipeline.project.settings import SECTIONS, UNPACKED, CutName, Project

__all__ = ["SECTIONS", "UNPACKED", "CutName", "Project"]
