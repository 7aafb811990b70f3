"""Reading records from files and datasets, and rows in several forms from records."""
