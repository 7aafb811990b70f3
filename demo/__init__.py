"""A whole run on real text and a real vocabulary, both from installed packages."""
