"""Tell a reader what a run does and did: status, summary, rows, timeline, report page."""
