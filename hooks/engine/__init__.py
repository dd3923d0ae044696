"""What the hooks share: state in memory as the planner sees it, and reports."""
