"""SiLU and softplus: the public functions in `op`, a file per backend beside it."""
