"""What a run was when it stopped, as digests: so that a resume which is not that run fails before it costs a night."""
