"""Names that changed, see :mod:`hooked_mamba.renamed`."""

from hooked_mamba.renamed import renamed_in as renamed_in
from hooked_mamba.renamed import warn_renamed as warn_renamed
