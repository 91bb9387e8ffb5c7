"""Weights of other projects in and out. No torch; each foreign layout is one table of rules, read both ways."""
