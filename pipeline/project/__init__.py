"""params.yaml -> a project: its data, its networks split, its stores.

settings.py    the sections, and the places that follow from them
roles.py       the section `towers:`
recipe.py      what decides the values of a state, read off a split network
workbench.py   one encoder's network: built, split, its stores opened
towers.py      encoders as training and prediction open them, and several in one model
carried.py     pretrained weights after a cut, beside its store
proved.py      which stores are known to be of the recipe these settings make
"""

from pipeline.project.settings import SECTIONS, UNPACKED, CutName, Project

__all__ = ["SECTIONS", "UNPACKED", "CutName", "Project"]
