"""Graphs as pages that need no network."""

from __future__ import annotations

from circuits.viewer.about import about_features as about_features
from circuits.viewer.page import circuit_page as circuit_page
from circuits.viewer.work import with_work as with_work
