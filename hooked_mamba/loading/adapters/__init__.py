"""Adapters: folders that PEFT wrote, merged into a checkpoint's weights before they get our names."""
