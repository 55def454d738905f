"""Which recurrence keeps what, and how long: five small models on one task, side by side.

python -m demos.recurrences                        the study, on the models in `demos/localisation/models`
python -m demos.localisation.train --task recall --family rwkv7 --out runs/recall-rwkv7      how one was made
"""
