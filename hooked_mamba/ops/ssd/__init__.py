"""The scan of Mamba-2: the public function in `op`, a file per backend beside it."""
