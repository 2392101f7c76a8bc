"""What runs outside the trainer's process: the server, the programs of models, and the judges of their answers.

    trainer ---- starts ----> server          a fresh interpreter behind walls; forks on request, holds no data
       |                        |
       | one answer, its tests  +-- fork --> judge      holds tests and expected values, never runs the model's code
       +------------------------------------>  |
                                +-- fork --> program    runs the model's code, holds neither tests nor expected values
                                               |
                                             judge <- plain data: what a call returned, what was printed

The server reads file descriptors only: text travels over sockets that a program or a judge gets with its fork, so
that nothing of one answer is in the memory from which the next one is forked. The modules of this package are
imported without `distil_kernels` (which needs torch): they use the standard library and each other.
"""
