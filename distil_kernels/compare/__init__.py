"""The objectives under equal conditions, small and from scratch: `python -m distil_kernels.compare` (minutes, CPU).

    tasks       four tasks on digits, and the habits that models start with
    model       a small decoder                       pretrain    habits, and the reading of corrections
    experiment  one run of one objective              study       the grid: tuning, reported seeds, resuming
    stopping    the length that a credit asks for
    report      tables                                figures     curves

What came out is in docs/results.md.
"""
