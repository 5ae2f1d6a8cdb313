"""One optimizer over several processes.

See `processes` for who they are and `shards` for what each has of a weight; what they exchange is
in `rlscuda.optim.steps.reduction`.
"""
