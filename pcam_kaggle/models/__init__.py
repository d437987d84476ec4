"""What is trained: our nets, timm's, their pretrained weights and checkpoints.

Nothing here knows of folds or of an optimizer.
"""
