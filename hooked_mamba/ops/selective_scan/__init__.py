"""The selective scan of Mamba-1: the public function in `op`, a file per backend beside it."""
