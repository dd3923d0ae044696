"""`optimstate demo`."""

from __future__ import annotations

from optimstate.cli.app import app


@app.command()
def demo() -> None:
    """Show the main job."""
