"""What this project is compared with, and how. Each script prints JSON lines and names machine and versions."""
