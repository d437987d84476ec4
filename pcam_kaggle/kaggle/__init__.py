"""The platform: its client, the notebook, submissions and their scores.

Everything else works without an account.
"""
