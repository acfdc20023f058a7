"""The types everything is said in, and what every room needs: groups, score matrices, options, ranks, files, errors."""
