"""Files that are whole or not there, and are what they say: written at once, read with checks.

Nothing here knows what a file is of.
"""
