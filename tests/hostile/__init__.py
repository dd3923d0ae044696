"""Hostile files, failing disks, signals: makers of attacks and faults, and what must hold against them."""
