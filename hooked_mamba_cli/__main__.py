"""`python -m hooked_mamba_cli`: the same as `hooked-mamba`."""

from hooked_mamba_cli.main import main

main()
