"""The server's Flower app."""
