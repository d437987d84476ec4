"""The command line: the parser and the function of each command; nothing that the notebook on Kaggle needs."""
