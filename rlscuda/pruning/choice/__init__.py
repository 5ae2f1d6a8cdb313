"""Who goes: what removals cost, in which order they come, how far they go, who makes up for them.

Nothing here changes the model.
"""
