"""The benchmark: what rules and policies save, and at what cost."""
