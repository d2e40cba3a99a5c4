"""Finished runs -> tables, curves and plots.

costs.py     results/encode.json: what stores hold and cost
summary.py   runs + costs -> table, curves, plot
cut_plot.py  the picture of `recycle cuts`
"""
