"""GPU operations of Loraplex, each with a plain torch twin for the CPU."""
