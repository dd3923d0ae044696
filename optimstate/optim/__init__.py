"""Drop-in torch.optim whose state carries parameter names."""
