"""What stands against the price, and the steps by which it comes to zero.

What goes, and when, is not decided here.
"""
