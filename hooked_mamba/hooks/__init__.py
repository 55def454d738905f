"""Hook points: declared by the modules that own them, found by name, cached and edited."""
