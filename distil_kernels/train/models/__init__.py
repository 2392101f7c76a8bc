"""Language models as the trainer uses them: loading, adapters, memory-saving layers, ways of reading, shards.

Nothing here knows of rollouts, teachers, losses or runs: prompts and completions are lists of token ids.
"""
