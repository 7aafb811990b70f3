"""Hand-written templates that turn a raw row into an instruction row."""
