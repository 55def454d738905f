"""Hybrids: one file a family, each with its fields, its layout and its weights."""
