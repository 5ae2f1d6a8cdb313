"""`python -m rlscuda.cli` is the command `rlscuda`."""

from rlscuda.cli import main

main()
