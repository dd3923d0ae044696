"""Container formats: one reader and writer a file, registered by name."""
