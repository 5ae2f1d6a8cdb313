"""How a model hangs together: which channels live and die together, and the proof of it.

Nothing here knows of matrices or costs, and nothing changes the model.
"""
