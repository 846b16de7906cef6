"""Where samples go beyond their files. One module for each sink; none knows of another."""
