"""Branches as the affine maps that they are once norms, gates and selection are held at a run's values.

linear      pieces that are affine: projections, convolutions, gains, and values mixed between positions
scan        what every held scan answers: outputs, adjoint, rows of its attention matrix
selective   the scans of Mamba-1 and Mamba-2, whose rows are made in blocks
pattern     attention
tokens      how tokens reach a scan through a convolution
chain       pieces composed, with named places between them
places      names of branches, streams and nodes, and their sites
run         one prompt's run
"""
