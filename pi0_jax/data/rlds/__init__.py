"""RLDS datasets."""
