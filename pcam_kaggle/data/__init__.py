"""Reads and checks the competition's files, and writes the patch store and the folds.

Independent of models and runs.
"""
