"""What goes out with a model: its card, and the way to a hub."""
