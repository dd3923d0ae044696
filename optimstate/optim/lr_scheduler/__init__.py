"""Learning-rate schedulers of torch.optim.lr_scheduler."""
