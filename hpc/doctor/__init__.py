"""Check an allocation before a run: probe every rank, then judge the findings."""
