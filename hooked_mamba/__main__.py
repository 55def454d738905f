"""`python -m hooked_mamba`: the same as `hooked-mamba`."""

from hooked_mamba.cli.app import main

main()
