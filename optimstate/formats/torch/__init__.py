"""What torch.save writes and wrote: zip archives, streams, plain pickles."""
