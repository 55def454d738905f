"""`python -m demos.notebooks [NAME ...]`: run notebooks from the top and store what they show."""

from __future__ import annotations

import sys
import time

from demos.notebooks.execute import differences, execute, notebooks, read, write


def main(names: list[str]) -> None:
    """Those with these names; without any, all."""
    known = notebooks()
    for name in names:
        if name not in known:
            raise SystemExit(f"there is no notebook {name!r}; there are {', '.join(known)}")
    for name in names or known:
        start = time.monotonic()
        stored = read(known[name])
        new = execute(stored)
        write(known[name], new)
        changed = len(differences(stored, new))
        print(f"{name}: {time.monotonic() - start:.0f} s, {changed} cells show something else than before")


if __name__ == "__main__":
    main(sys.argv[1:])
