"""Read a corpus: its files, its rows, their tokens, and the store that they are kept in."""
