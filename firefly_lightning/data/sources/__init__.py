"""Reading records from files and datasets, and rows in three forms from records."""
