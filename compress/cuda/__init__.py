"""CUDA kernels on packed weights: their sources (source), the machine (support), compiling and launching (compiler)."""
