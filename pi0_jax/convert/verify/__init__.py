"""Conversions held against the frameworks they come from."""
