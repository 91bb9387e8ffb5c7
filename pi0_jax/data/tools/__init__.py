"""What `pi0 data` does with demonstrations."""
