"""Features: where they are active, which tokens they promote, which are similar; as numbers and as an offline page."""

from saes.explorer.collect import collect as collect
from saes.explorer.data import Contexts as Contexts
from saes.explorer.data import FeatureData as FeatureData
from saes.explorer.data import Ranked as Ranked
from saes.explorer.explore import Explorer as Explorer
from saes.explorer.explore import explore as explore
from saes.explorer.explore import feature_explorer as feature_explorer
from saes.explorer.page import Page as Page
from saes.explorer.page import render as render
