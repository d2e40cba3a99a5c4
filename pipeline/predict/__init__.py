"""Inputs -> keys -> states, known or new -> suffixes of finished runs -> predictions.

flow.py         reuse at inference
predictions.py  the file they go to
"""
