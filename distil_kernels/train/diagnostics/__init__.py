"""Measurements that no step depends on: for the records, and for the report.

Nothing here changes a weight, or draws from the random numbers of the training.
"""
