"""Places of the losses in other projects' trainers. Each is imported when asked for, and its project is an extra."""
