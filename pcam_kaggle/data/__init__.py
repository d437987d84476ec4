"""Reads and checks the competition's files, and writes the patch store and the folds; independent of models and runs."""
