"""Examples that stay on disk: what reads them by rows, and the kinds of files there are."""
