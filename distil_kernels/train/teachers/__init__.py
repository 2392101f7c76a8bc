"""Teachers: what the student learns from at every token, from a model in this process or behind an endpoint.

Nothing here computes a loss or chooses what a teacher reads.
"""
