"""What a person sees of a run: lines in the terminal, plot.svg, one rollout in colours, and the page report.html.

Everything here reads records and writes text. Nothing here runs a model or changes a run.
"""
