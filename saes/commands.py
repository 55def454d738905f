"""`hooked-mamba sae`: train, fine-tune, evaluate, capture, explore, share and fetch dictionaries.

The commands stand in files of their own; each imports what it needs when it runs, so that help is fast.
"""

from __future__ import annotations

from saes.command_options import app as app
from saes.command_options import explore_app as explore_app
from saes.sharing_commands import list_, pull, push
from saes.training_commands import capture, eval_, finetune, train
from saes.viewing_commands import explore

ORDER = (train, finetune, eval_, capture, explore, push, pull, list_)
"""As help lists them."""

app.registered_commands.sort(key=lambda command: ORDER.index(command.callback))
