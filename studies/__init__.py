"""Studies of the objectives: `theory` (claims as exact numbers) and `compare` (training under equal conditions).

They use the public ops and the trainer as any user would; nothing that a user of the library needs may live here.
"""
