"""Hybrids: one file per family, each with its fields, its layout and its weights."""
