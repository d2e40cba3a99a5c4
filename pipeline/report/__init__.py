"""Finished runs -> tables, curves, plots and the page.

costs.py    results/encode.json: what stores hold and cost
charts.py   Vega-Lite specifications -> SVG and PNG
forecast.py results/plan.json: predicted costs, verdicts, predicted beside measured
summary.py  runs + costs -> table, curves, plot
samples.py  the samples that a page shows: pictures and marked texts
figures.py  the charts of the page with their captions
page.py     results/report.html
"""
