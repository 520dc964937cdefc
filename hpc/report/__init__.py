"""What a run did, for a reader: status, summary, timeline, report page."""
