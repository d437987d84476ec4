"""Models: the project's own CNN and timm's classifiers with their pretrained weights."""
