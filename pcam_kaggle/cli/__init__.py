"""The command line: what can be typed, and what each command does.

Nothing that the notebook on Kaggle needs belongs here.
"""
