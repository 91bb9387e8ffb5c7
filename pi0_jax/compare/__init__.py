"""Comparing kinds of policies with one another: train each, measure each alike, and say how it came out."""
