"""A run as a program: its directory, checkpoints, processes, log, warnings and trackers.

Nothing here knows what is learnt: no task, rollout or teacher.
"""
