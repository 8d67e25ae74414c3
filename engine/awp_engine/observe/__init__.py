"""What a run shows of itself: logs, curves, reports, warnings, traces, and what a step costs."""
