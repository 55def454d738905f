"""The command line `hooked-mamba`, above the three packages.

It is a package of its own so that help comes at once: nothing here imports torch before a command runs.
"""
