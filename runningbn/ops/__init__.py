"""One training step: the linear state, the constants of the update, the update itself, autograd, masks and ranks."""
