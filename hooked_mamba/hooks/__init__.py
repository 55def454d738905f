"""Hook points: declared by the modules that own them, found by name, read into caches and edited."""
