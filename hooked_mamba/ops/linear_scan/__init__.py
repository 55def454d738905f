"""The first-order recurrence: the public function in `op`, a file per backend beside it."""
