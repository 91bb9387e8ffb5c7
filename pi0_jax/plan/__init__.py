"""Cost of training on devices that need not be there."""
