"""Position -1 is each row's own last real token, on whichever side a batch is padded: every row is as it is alone."""

LENGTHS = (6, 3, 6, 5)
