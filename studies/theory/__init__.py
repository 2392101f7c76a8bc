"""The claims behind the objectives, as exact numbers: `python -m studies.theory` (seconds, CPU, float64).

Nothing is sampled from a model or trained by the trainer here; derivations are in docs/theory.md, not in the code.

    bandit    first-order changes of the reward: three actions, and shares of random pairs
    tabular   multi-step problems with every rollout enumerated: token-wise and sequence-level gradients
    regret    the DAgger loop and its bounds
    success   a lower bound on the success probability; Pass@N of students trained to convergence
    results   all four measured, as a table and as theory.json
    plots     the figures of docs/theory.md

tests/studies/test_theory.py asserts every number.
"""
