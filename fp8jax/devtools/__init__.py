"""For developing kernels: compile them for GPUs that are not here, time them on one that is."""
