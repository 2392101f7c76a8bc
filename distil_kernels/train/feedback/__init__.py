"""Feedback: the kinds of it, and the prompts that show it to the teacher.

Nothing here knows of teachers' distributions or of losses.
"""
