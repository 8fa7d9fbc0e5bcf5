"""A run folder to pictures and one page. Reads files only and imports no torch."""
