"""The claims behind the objectives, as numbers: `python -m studies.theory` (seconds, CPU, float64).

    bandit    first-order changes of the reward, exact for three actions, shares of random pairs
    tabular   multi-step problems with every rollout enumerated; token-wise against sequence-level gradients
    regret    the DAgger loop against its bounds
    success   a lower bound on the success probability; Pass@N of students trained to convergence
    report    the table, theory.json          figures   the pictures

Derivations are in docs/theory.md. Every number is also asserted in tests/test_theory.py.
"""
