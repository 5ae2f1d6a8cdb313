"""Each operator by itself, and the streaming filter, against eager PyTorch and a ceiling."""
