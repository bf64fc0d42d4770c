"""What several tests share: tiny cells, oracles, kernels to compile, processes to start."""
