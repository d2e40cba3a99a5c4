"""What finished runs and stores say of themselves, and the table, the curves and the plot made of it.

runs.py     a run's identity, its files, and how it is opened again
costs.py    results/encode.json
summary.py  runs + costs -> table, curves, plot
"""
