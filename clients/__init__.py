"""The clients' Flower app."""
