"""Nets: the project's own and timm's, pretrained weights, and checkpoints.

Independent of folds and optimizers.
"""
