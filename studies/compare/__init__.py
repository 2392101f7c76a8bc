"""The objectives under equal conditions: `python -m studies.compare` (small models from scratch: minutes, CPU),
`python -m studies.compare language` (a real language model in the trainer: hours, CPU).

    grid        tuning, reported seeds, resuming
    tasks       four tasks on digits, and the habits that models start with
    model       a small decoder                       pretrain    habits, and the reading of corrections
    experiment  one run of one objective              study       settings and budgets of the small models
    language    runs and budgets of a real model
    stopping    the length that a credit asks for
    report      tables                                figures     curves

What came out is in docs/results.md.
"""
