"""Files that ranks saved one by one, read as one checkpoint."""
