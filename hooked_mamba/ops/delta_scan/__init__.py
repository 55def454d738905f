"""The scan of the delta rule: the public function in `op`, a file per backend beside it."""
