"""The depthwise causal convolution: the public function in `op`, a file per backend beside it."""
