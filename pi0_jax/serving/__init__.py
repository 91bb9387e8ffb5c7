"""Policies over the network: openpi's WebSocket protocol, a server that batches, guards and watches, and a client."""
