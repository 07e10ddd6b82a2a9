"""Each operation of the package in plain torch, with the same signature: the reference of tests and benchmarks."""
