"""Single weights that go: masks as torch has them, chosen and compensated in closed form.

No tensor changes its shape here, but where units that have lost all connections leave (`units`).
"""
