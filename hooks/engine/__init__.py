"""What the hooks share: live state as the planner sees it, and reports."""
