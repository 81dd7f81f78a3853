"""What every other room may use and what knows none of them: files, text, terminals, threads, the heap."""
