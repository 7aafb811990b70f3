"""``firefly plan``: what memory, steps and tokens a run will take, before it is started."""
