"""What `benchmarks/gpu_check.sh` is made of: its journal, its report, and its dry run on a CPU."""
