"""A tour of one prediction: read every site, edit some, see what moves. `python -m demos.tour`."""
