"""Certificates: digests of a run when it stopped, with which a resume that is not the same run is refused."""
