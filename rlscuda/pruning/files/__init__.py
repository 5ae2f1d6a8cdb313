"""A pruned model as a file: saved and made again, or exported to run elsewhere.

Nothing here prunes.
"""
