"""How ranks talk, where each runs, and what tells them to stop."""
