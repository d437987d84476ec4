"""The platform: its client, the competition's archive, the notebook, submissions and their scores.

Nothing outside of this package talks to Kaggle.
"""
