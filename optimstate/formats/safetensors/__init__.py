"""Safetensors files, shards and whole training checkpoints."""
