"""Demonstrations in HDF5, to be converted."""
