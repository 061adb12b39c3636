"""What is found out about models, packages and caches for people to look at."""
