"""What training and sampling take on devices that need not be there."""
