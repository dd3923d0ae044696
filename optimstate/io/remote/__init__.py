"""Checkpoints in stores: `s3://`, `gs://`, `az://`, `hf://` and `https://`, read by ranges and written by parts."""
