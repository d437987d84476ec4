"""The command line: the parser and the function of each command.

Nothing that the notebook on Kaggle needs belongs here.
"""
