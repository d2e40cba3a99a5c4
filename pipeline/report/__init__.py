"""Finished runs -> tables, curves and plots.

costs.py    results/encode.json: what stores hold and cost
forecast.py results/plan.json: predicted costs, verdicts, predicted beside measured
summary.py  runs + costs -> table, curves, plot
"""
