"""The command line, and what starts and supervises training: no torch here, it runs on login nodes."""
