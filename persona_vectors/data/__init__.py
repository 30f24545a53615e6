"""What the others stand on: errors for input, files, ledgers, intervals, traits, samples; and what ships."""
