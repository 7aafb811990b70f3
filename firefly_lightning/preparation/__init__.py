"""From raw task rows to instruction rows: ``firefly build``, ``firefly clean`` and ``firefly stats``."""
