"""Figures of runs and their comparison, as an HTML page and in notebooks."""
