"""Changes of a dense decoder's weights that leave its function as it was, and the proof that they do."""
