"""A comparison as one HTML page with figures.

Its numbers come from `scoring`.
"""
