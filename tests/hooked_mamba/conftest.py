"""One thread: tiny models gain nothing from more, and lose much where other programs share the cores."""

import torch

torch.set_num_threads(1)
