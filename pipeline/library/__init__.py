"""Stores in a training loop of the user's own; `layer_recycling` is this package's public face.

recipe.py   `split`, and the recipe of what its prefix makes of a data set
fields.py   columns of what belongs to items beside their states
items.py    items of any data set -> inputs of the prefix, keys and fields
table.py    the items of one data set in a store
store.py    items with their states: data sets, batches, loaders
project.py  the stores of a project, in the same form
states.py   states without a network, and files of them
features.py features that another program wrote
adopt.py    such features -> a store
encode.py   the flow: data set -> store
"""
