"""The Triton kernels on a GPU: checked, tuned, compared with peers and run in a whole decoder (`bench/gpu.sh`)."""
