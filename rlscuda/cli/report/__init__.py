"""The report of a pruning: what is recorded of it, its words and figures, its page and its folder.

It prunes nothing and knows no trainer; training and pruning hand it a finished record.
"""
