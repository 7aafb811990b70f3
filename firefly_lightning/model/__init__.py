"""A fast Bloom, its loss and its metrics, over target tokens only."""
