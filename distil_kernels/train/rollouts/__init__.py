"""Rollouts: what samples completions (a model, a vLLM server), and the tool that they may call.

Nothing here knows of feedback, teachers or losses.
"""
