"""Policies in closed loop, and the report that shows what they do."""
