"""Looking after whole stores.

attachments    folders of a store that hold no states: the pretrained suffix, the probe
describe       what a store holds, in figures and in words
plans          what gc, compact and rm-samples would replace
rewrite        replacing segments by others
projected      the size of a store of more samples
verify         proof of every byte of a store

Imports: `format`, `local`, `store`, and each other in this order.
"""
