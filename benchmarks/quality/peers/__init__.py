"""Other libraries, each as a program that runs alone in an environment of its own."""
