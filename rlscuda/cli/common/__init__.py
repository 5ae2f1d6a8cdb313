"""What every command needs: errors of one line, options, texts made safe, folders held and whole.

Nothing here knows what a run or a pruning is.
"""
