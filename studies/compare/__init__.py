"""The objectives under equal conditions: `python -m studies.compare` (small models from scratch: minutes, CPU) and
`python -m studies.compare language` (a real language model in the trainer: hours, CPU). Results: docs/results.md.

Runs and their evaluation live here; a loss or a training feature does not: those come from the package.

    grid             tuning, reported seeds, resuming
    small            settings and budgets of the small models
    language         runs, settings and budgets of a real model
    experiment       one run of one objective on a small model
    decoder          the small model
    digit_tasks      its tasks, and the habits that models start with
    pretrain         habits, and the reading of corrections
    stopping         the length that a credit asks for
    accuracy_tables  tables, and the marked block of docs/results.md
    learning_curves  figures
"""
