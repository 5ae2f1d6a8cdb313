"""Where labelled images come from, and the data set that a run makes of them.

Nothing here knows what is trained on them.
"""
