"""The stages in order, and the job that they work on.

Each stage is a function here that calls one of the packages below.
"""
