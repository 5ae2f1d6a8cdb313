"""What tests share: models, cases, comparisons, a command line in this process; no test."""
