"""One optimizer over several processes.

See `processes` for who they are and `reduction` for what they exchange.
"""
