"""Scripts that compare this project with others. Each prints JSON lines, the first with machine and versions."""
