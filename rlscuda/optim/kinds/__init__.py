"""Kinds of modules: what the RLS rule covers of each, and what a call of it shows.

Nothing here knows of `P`, hooks or parameter groups.
"""
