"""How ``firefly clean`` works: rows are looked at one by one, on all cores, and then compared with each other."""
