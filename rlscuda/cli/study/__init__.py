"""`rlscuda study`: controlled studies on data sets at hand, into a folder."""
